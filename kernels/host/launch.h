// Registers and calls a kernel that g++ has compiled, and checks the arguments against its parameters.
// Every kernel's test compiles this file, so it includes little.

#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda.h"

namespace kdx::host {

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* problem, ...);

/// One argument of a launch: the address and type of a tensor ("null" without a tensor), or the bytes of a number.
struct Argument {
    bool pointer;
    char type[16];
    void* address;
    unsigned char bytes[8];
};

/// The names of the tensor or number types that fit a C++ type; no name if a pointer takes any type.
template <class T>
constexpr const char* types[2] = {nullptr, nullptr};
template <>
constexpr const char* types<float>[2] = {"float32", nullptr};
template <>
constexpr const char* types<double>[2] = {"float64", nullptr};
template <>
constexpr const char* types<__half>[2] = {"float16", nullptr};
template <>
constexpr const char* types<__nv_bfloat16>[2] = {"bfloat16", nullptr};
template <>
constexpr const char* types<int>[2] = {"int32", nullptr};
template <>
constexpr const char* types<unsigned>[2] = {"uint32", "int32"};
template <>
constexpr const char* types<long long>[2] = {"int64", nullptr};
template <>
constexpr const char* types<unsigned long long>[2] = {"uint64", "int64"};
template <>
constexpr const char* types<unsigned char>[2] = {"uint8", "bool"};
template <>
constexpr const char* types<bool>[2] = {"bool", nullptr};

template <class P>
P converted(const Argument& argument, size_t place) {
    constexpr bool pointer = std::is_pointer_v<P>;
    const auto expected = types<std::remove_cv_t<std::remove_pointer_t<P>>>;
    bool fits = pointer && (!expected[0] || !strcmp(argument.type, "null"));
    for (int i = 0; i < 2; ++i) fits = fits || (expected[i] && !strcmp(argument.type, expected[i]));
    if (argument.pointer != pointer || !fits)
        fail("argument %zu is %s %s and the kernel takes %s%s", place, argument.pointer ? "a tensor of" : "the number", argument.type,
             pointer ? "a pointer to " : "", expected[0] ? expected[0] : "anything");
    if constexpr (pointer) {
        return static_cast<P>(argument.address);
    } else {
        P value;
        static_assert(sizeof value <= sizeof argument.bytes);
        memcpy(&value, argument.bytes, sizeof value);
        return value;
    }
}

/// A kernel with its arguments, which every thread calls once.
struct Call {
    virtual ~Call() = default;
    virtual void run() const = 0;
};

template <class... P>
struct CallOf : Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;

    template <size_t... place>
    CallOf(void (*kernel)(P...), const Argument* values, std::index_sequence<place...>)
        : kernel(kernel), arguments{converted<P>(values[place], place)...} {}
    void run() const override { std::apply(kernel, arguments); }
};

template <class... P>
Call* call(void (*kernel)(P...), const Argument* arguments, size_t count) {
    if (count != sizeof...(P)) fail("%zu arguments for a kernel that takes %zu", count, sizeof...(P));
    return new CallOf<P...>(kernel, arguments, std::index_sequence_for<P...>{});
}

/// Registers a kernel by its name.
struct Kernel {
    using Bind = Call* (*)(const Argument* arguments, size_t count);
    Kernel(const char* name, Bind bind);
};

}  // namespace kdx::host

#define KDX_KERNEL(name)                                                                           \
    static const kdx::host::Kernel name##_kernel{                                                  \
        #name, [](const kdx::host::Argument* arguments, size_t count) { return kdx::host::call(name, arguments, count); }};
