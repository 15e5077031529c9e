// One launch of a kernel on the CPU: reads it from standard input, runs it, and writes the memory of every tensor to standard output.
//
// Blocks run one after another. The threads of a block are fibers. A fiber runs until it waits at a barrier or for its warp; then the
// order chooses the next fiber that can run: the first, the last, or a random one. A kernel that lacks a barrier, or depends on the
// order of blocks, gives wrong results in one of the orders. Tensors are heap copies of their exact size, so that the address sanitizer
// detects an access outside, and shared memory is filled with NaN before every block.
//
// Two errors cannot be detected here: a missing memory fence, because every thread sees each write at once, and blocks that wait for
// one another.

#include "launch.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <sanitizer/common_interface_defs.h>
#include <set>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace kdx::host {

// Failures: the message names the block and the thread, and the process ends

struct Thread;
static Thread* current = nullptr;

void fail(const char* problem, ...) {
    const auto [bx, by, bz] = blockIdx;
    const auto [x, y, z] = threadIdx;
    if (current) fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", bx, by, bz, x, y, z);
    va_list values;
    va_start(values, problem);
    vfprintf(stderr, problem, values);
    fflush(stderr);
    _exit(1);
}

// Fibers

constexpr size_t stack_bytes = 256 << 10;

struct Wait {
    const char* what = nullptr;  // the name of a warp operation, or the file of a barrier; null while the thread can run
    int line = 0;                // of the barrier
    unsigned mask = 0;           // of the warp operation; 0 at a barrier
    bool operator==(const Wait& other) const {
        return line == other.line && mask == other.mask && what && other.what && !strcmp(what, other.what);
    }
    std::string text() const { return line ? "the barrier at " + std::string(what) + ":" + std::to_string(line) : what; }
};

struct Thread {
    unsigned number;
    uint3 index;
    bool exited;
    Wait wait;
    Meeting meeting;    // on entry posted[own lane], on return the values of all lanes
    void* stack = nullptr;
    void* resume[5];
    unsigned lane() const { return number % 32; }
};

static void* scheduler[5];
static const void* scheduler_stack;
static size_t scheduler_stack_bytes;
static std::unique_ptr<Call> kernel;

// Stacks are switched by the compiler's own jump: the library's functions would clear the sanitizer's records of a stack.
__attribute__((noinline, noreturn, no_sanitize("address", "undefined"))) static void jump(void** to) { __builtin_longjmp(to, 1); }

__attribute__((noinline, no_sanitize("address", "undefined"))) static void change(void** from, void** to) {
    if (!__builtin_setjmp(from)) jump(to);
}

static void yield_to_scheduler() {
    Thread& own = *current;
    void* sanitizer;
    __sanitizer_start_switch_fiber(&sanitizer, scheduler_stack, scheduler_stack_bytes);
    change(own.resume, scheduler);
    __sanitizer_finish_switch_fiber(sanitizer, nullptr, nullptr);
}

static ucontext_t started;

/// The loop of a fiber: one iteration per block.
static void run_fiber() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    for (;;) {
        kernel->run();
        current->exited = true;
        yield_to_scheduler();
    }
}

__attribute__((noinline, no_sanitize("address", "undefined"))) static void begin() {
    if (!__builtin_setjmp(scheduler)) setcontext(&started);
}

static void run(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    void* sanitizer;
    const bool first = !thread.stack;
    if (first) {
        thread.stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (thread.stack == MAP_FAILED) fail("no memory for a thread's stack");
        getcontext(&started);
        started.uc_stack.ss_sp = thread.stack;
        started.uc_stack.ss_size = stack_bytes;
        started.uc_link = nullptr;
        makecontext(&started, run_fiber, 0);
    }
    __sanitizer_start_switch_fiber(&sanitizer, thread.stack, stack_bytes);
    first ? begin() : change(scheduler, thread.resume);
    __sanitizer_finish_switch_fiber(sanitizer, nullptr, nullptr);
    current = nullptr;
}

// A block

static std::vector<std::unique_ptr<Thread>> threads;  // of the block that runs

/// Ranks by which the next thread or block is chosen, the smallest first.
struct Order {
    std::string name;
    std::mt19937_64 random;
    double rank(size_t number) {
        return name == "forward" ? double(number) : name == "reverse" ? -double(number) : double(random() >> 11);
    }
};

static Order order;
static std::set<std::pair<double, unsigned>> ready;
static size_t at_barrier;

static void wake(Thread& thread) {
    thread.wait = {};
    ready.emplace(order.rank(thread.number), thread.number);
}

void barrier(const char* file, int line) {
    current->wait = {file, line, 0};
    ++at_barrier;
    yield_to_scheduler();
}

Meeting meet(const char* operation, unsigned mask, uint64_t posted) {
    Thread& own = *current;
    if (!(mask >> own.lane() & 1)) fail("%s by a lane that its mask does not name", operation);
    own.wait = {operation, 0, mask};
    own.meeting.posted[own.lane()] = posted;
    yield_to_scheduler();
    return own.meeting;
}

unsigned lane() { return current->lane(); }

uint64_t value_of(const Meeting& meeting, unsigned source) {
    if (!(meeting.lanes >> source & 1)) fail("a shuffle reads lane %u, which does not take part", source);
    return meeting.posted[source];
}

/// Wakes the lanes in the mask of the operation at which ``waiting`` waits, if all of them have arrived.
static void try_meeting(Thread& waiting) {
    const unsigned first = waiting.number - waiting.lane();
    Meeting meeting{};
    for (unsigned lane = 0; lane < 32 && first + lane < threads.size(); ++lane) {
        Thread& thread = *threads[first + lane];
        if (!(waiting.wait.mask >> lane & 1) || thread.exited) continue;
        if (!(thread.wait == waiting.wait)) return;
        meeting.posted[lane] = thread.meeting.posted[lane];
        meeting.lanes |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane)
        if (meeting.lanes >> lane & 1) {
            threads[first + lane]->meeting = meeting;
            wake(*threads[first + lane]);
        }
}

/// After a lane has exited, the other lanes of its warp no longer wait for it.
static void try_meetings_of_warp(const Thread& exited) {
    const size_t first = exited.number - exited.lane();
    for (size_t number = first; number < std::min(first + 32, threads.size()); ++number)
        if (threads[number]->wait.mask) try_meeting(*threads[number]);
}

[[noreturn]] static void fail_for_divergence() {
    std::map<std::string, size_t> states;
    for (const auto& thread : threads) ++states[thread->exited ? "exited" : "at " + thread->wait.text()];
    std::string counts;
    for (const auto& [state, count] : states) counts += (counts.empty() ? "" : ", ") + std::to_string(count) + " " + state;
    fail("the threads of block (%u, %u, %u) wait for one another: %s", blockIdx.x, blockIdx.y, blockIdx.z, counts.c_str());
}

static void pass_barrier() {
    if (at_barrier < threads.size()) fail_for_divergence();
    for (const auto& thread : threads)
        if (!(thread->wait == threads[0]->wait)) fail_for_divergence();
    at_barrier = 0;
    for (const auto& thread : threads) wake(*thread);
}

extern "C" unsigned char __start_kdx_shared[] __attribute__((weak)), __stop_kdx_shared[] __attribute__((weak));
static std::unique_ptr<unsigned char[]> dynamic;
static size_t dynamic_bytes;

void* dynamic_shared() { return dynamic.get(); }

/// Bytes of 255 are NaN in every floating type. The section also contains the gaps of the sanitizer, so this function is not checked.
__attribute__((no_sanitize("address"))) static void fill_shared() {
    for (volatile unsigned char* at = __start_kdx_shared; at != __stop_kdx_shared; ++at) *at = 0xff;
    for (size_t i = 0; i < dynamic_bytes; ++i) dynamic[i] = 0xff;
}

static void run_block() {
    fill_shared();
    for (const auto& thread : threads) {
        thread->exited = false;
        wake(*thread);
    }
    for (size_t left = threads.size(); left;) {
        if (ready.empty()) pass_barrier();
        Thread& thread = *threads[ready.begin()->second];
        ready.erase(ready.begin());
        run(thread);
        if (thread.exited) {
            --left;
            try_meetings_of_warp(thread);
        } else if (thread.wait.mask) {
            try_meeting(thread);
        }
    }
}

// A launch

static std::map<std::string, Kernel::Bind>& kernels() {
    static std::map<std::string, Kernel::Bind> registered;
    return registered;
}

Kernel::Kernel(const char* name, Bind bind) { kernels()[name] = bind; }

static std::string word() {
    char text[256];
    if (scanf("%255s", text) != 1) fail("the launch ends early");
    return text;
}

static size_t number() { return std::stoull(word()); }

static uint3 size(const char* what, uint3 limit) {
    const size_t x = number(), y = number(), z = number();
    if (!x || !y || !z || x > limit.x || y > limit.y || z > limit.z) fail("the %s has a size that no device takes", what);
    return {unsigned(x), unsigned(y), unsigned(z)};
}

static void launch() {
    const std::string name = word();
    gridDim = size("grid", {2147483647, 65535, 65535});
    blockDim = size("block", {1024, 1024, 64});
    const size_t block = size_t(blockDim.x) * blockDim.y * blockDim.z;
    if (block > 1024) fail("a block has at most 1024 threads");
    dynamic_bytes = number();
    dynamic.reset(new unsigned char[dynamic_bytes]);
    order.name = word();
    order.random.seed(number());

    struct Memory {
        unsigned char* start;
        size_t bytes;
    };
    std::vector<Memory> memories(number());
    for (Memory& memory : memories) {
        memory.bytes = number();
        void* start;
        if (posix_memalign(&start, 256, memory.bytes)) fail("no memory for a tensor");  // as the device allocates
        memory.start = static_cast<unsigned char*>(start);
    }
    std::vector<Argument> arguments(number());
    for (Argument& argument : arguments) {
        const std::string kind = word();
        argument = {kind != "number", "null", nullptr, {}};
        if (kind == "null") continue;
        strncpy(argument.type, word().c_str(), sizeof argument.type - 1);
        if (kind == "number") {
            const std::string hex = word();
            for (size_t i = 0; 2 * i < hex.size(); ++i) argument.bytes[i] = (unsigned char)std::stoul(hex.substr(2 * i, 2), nullptr, 16);
        } else {
            const size_t which = number();
            argument.address = memories[which].start + number();
        }
    }
    getchar();  // the end of the line; the bytes of the tensors follow
    for (const Memory& memory : memories)
        if (fread(memory.start, 1, memory.bytes, stdin) != memory.bytes) fail("the launch ends early");

    const auto entry = kernels().find(name);
    if (entry == kernels().end()) fail("no kernel %s", name.c_str());
    kernel.reset(entry->second(arguments.data(), arguments.size()));

    for (unsigned z = 0; z < blockDim.z; ++z)
        for (unsigned y = 0; y < blockDim.y; ++y)
            for (unsigned x = 0; x < blockDim.x; ++x) {
                threads.push_back(std::make_unique<Thread>());
                threads.back()->number = unsigned(threads.size()) - 1;
                threads.back()->index = {x, y, z};
            }
    std::vector<std::pair<double, size_t>> blocks(size_t(gridDim.x) * gridDim.y * gridDim.z);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = {order.rank(i), i};
    std::sort(blocks.begin(), blocks.end());
    for (const auto& [rank, i] : blocks) {
        blockIdx = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y), unsigned(i / gridDim.x / gridDim.y)};
        run_block();
    }
    for (const Memory& memory : memories)
        if (fwrite(memory.start, 1, memory.bytes, stdout) != memory.bytes) fail("the results cannot be written");
    fflush(stdout);
}

}  // namespace kdx::host

int main() {
    kdx::host::launch();
    _exit(0);  // without destructors: fibers still have frames on their stacks
}
