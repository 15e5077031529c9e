/* Interposes the calls of libc that change files below one folder (LD_PRELOAD), so that a test can fail any one of them.
 *
 * hostile_arm(folder, mode, number) starts to count calls; at the call `number` (from 1) the mode takes effect. The counter is shared
 * with forked processes. The mode DIE kills the whole process group, like a power failure.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, DIE, DIE_IN_WRITE, FULL, READ_ONLY, VANISH };

struct state { long calls, writes; };
static struct state *shared;
static char root[PATH_MAX];
static size_t root_length;
static int mode, armed;
static long target;

__attribute__((constructor)) static void start(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void hostile_arm(const char *folder, int mode_, long target_) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    mode = mode_;
    target = target_;
    shared->calls = shared->writes = 0;
    armed = 1;
}

long hostile_calls(void) { return shared->calls; }
long hostile_writes(void) { return shared->writes; }

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

static int inside(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || path[root_length] == 0);
}

static int folder_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length >= 0;
}

static int is_path_inside(int folder, const char *path) {
    char start[PATH_MAX], whole[2 * PATH_MAX];
    if (!armed) return 0;
    if (path[0] == '/') return inside(path);
    if (folder == AT_FDCWD ? !getcwd(start, sizeof start) : !folder_of(folder, start)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", start, path);
    return inside(whole);
}

static int is_file_inside(int descriptor) {
    char path[PATH_MAX];
    return armed && folder_of(descriptor, path) && inside(path);
}

/* Count a call. Returns the errno with which it fails, or 0. takes_space: whether a full disk refuses it. */
static int failing(int takes_space) {
    long number = __atomic_add_fetch(&shared->calls, 1, __ATOMIC_SEQ_CST);
    if (mode == DIE && number == target) die();
    if (mode == VANISH && number == target) {
        char gone[PATH_MAX + 8];
        snprintf(gone, sizeof gone, "%s.gone", root);
        syscall(SYS_rename, root, gone);
    }
    if (mode == READ_ONLY && number >= target) return EROFS;
    if (mode == FULL && number >= target && takes_space) return ENOSPC;
    return 0;
}

#define GUARD(condition, takes_space)                                   \
    if (condition) {                                                    \
        int error = failing(takes_space);                               \
        if (error) { errno = error; return -1; }                        \
    }

/* Returns how many bytes to write of `size`; -1 with errno if the write fails. */
static ssize_t permitted(int descriptor, size_t size, int *dies) {
    *dies = 0;
    if (!is_file_inside(descriptor)) return size;
    long number = __atomic_add_fetch(&shared->writes, 1, __ATOMIC_SEQ_CST);
    if (mode == DIE_IN_WRITE && number == target) { *dies = 1; return size / 2; }
    if (mode == FULL && __atomic_load_n(&shared->calls, __ATOMIC_SEQ_CST) + 1 == target && size > 1) { /* a part still fits */
        failing(0);
        return size / 2;
    }
    int error = failing(1);
    if (error) { errno = error; return -1; }
    return size;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    int dies;
    ssize_t length = permitted(descriptor, size, &dies);
    if (length < 0) return -1;
    ssize_t written = syscall(SYS_write, descriptor, data, length);
    if (dies) die();
    return written;
}

static ssize_t write_at(int descriptor, const void *data, size_t size, off64_t offset) {
    int dies;
    ssize_t length = permitted(descriptor, size, &dies);
    if (length < 0) return -1;
    ssize_t written = syscall(SYS_pwrite64, descriptor, data, length, offset);
    if (dies) die();
    return written;
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) { return write_at(descriptor, data, size, offset); }
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) { return write_at(descriptor, data, size, offset); }

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    GUARD(is_file_inside(descriptor), 1)
    return syscall(SYS_writev, descriptor, parts, count);
}

static int changes(int flags) { return flags & (O_CREAT | O_TRUNC); }
static int exists(int folder, const char *path) { return faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0; }
static int is_new(int folder, const char *path) { return !exists(folder, path); }
/* Whether mkdir would succeed: Python also calls it for folders that exist, and before their parents exist. */
static int is_new_folder(int folder, const char *path) {
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (slash) *slash = 0;
    return is_new(folder, path) && (!slash || exists(folder, parent));
}

static int open_file(int folder, const char *path, int flags, mode_t permissions) {
    if (changes(flags) && is_path_inside(folder, path)) {
        int error = failing(is_new(folder, path));
        if (error) { errno = error; return -1; }
    } else if (mode == READ_ONLY && (flags & O_ACCMODE) != O_RDONLY && is_path_inside(folder, path) && shared->calls >= target) {
        errno = EROFS;
        return -1;
    }
    return syscall(SYS_openat, folder, path, flags, permissions);
}

#define OPEN(name)                                              \
    int name(const char *path, int flags, ...) {                \
        va_list rest;                                           \
        va_start(rest, flags);                                  \
        mode_t permissions = va_arg(rest, mode_t);              \
        va_end(rest);                                           \
        return open_file(AT_FDCWD, path, flags, permissions);   \
    }
#define OPENAT(name)                                                    \
    int name(int folder, const char *path, int flags, ...) {            \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t permissions = va_arg(rest, mode_t);                      \
        va_end(rest);                                                   \
        return open_file(folder, path, flags, permissions);             \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to) {
    GUARD(is_path_inside(AT_FDCWD, to) || is_path_inside(AT_FDCWD, from), 0)
    return syscall(SYS_rename, from, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    GUARD(is_path_inside(to_folder, to), 0)
    return syscall(SYS_renameat, from_folder, from, to_folder, to);
}
int unlink(const char *path) {
    GUARD(is_path_inside(AT_FDCWD, path) && exists(AT_FDCWD, path), 0)
    return syscall(SYS_unlink, path);
}
int unlinkat(int folder, const char *path, int flags) {
    GUARD(is_path_inside(folder, path), 0)
    return syscall(SYS_unlinkat, folder, path, flags);
}
int rmdir(const char *path) {
    GUARD(is_path_inside(AT_FDCWD, path), 0)
    return syscall(SYS_rmdir, path);
}
int mkdir(const char *path, mode_t permissions) {
    GUARD(is_path_inside(AT_FDCWD, path) && is_new_folder(AT_FDCWD, path), 1)
    return syscall(SYS_mkdir, path, permissions);
}
int mkdirat(int folder, const char *path, mode_t permissions) {
    GUARD(is_path_inside(folder, path) && is_new_folder(folder, path), 1)
    return syscall(SYS_mkdirat, folder, path, permissions);
}
int link(const char *from, const char *to) {
    GUARD(is_path_inside(AT_FDCWD, to), 1)
    return syscall(SYS_link, from, to);
}
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    GUARD(is_path_inside(to_folder, to), 1)
    return syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
}
int ftruncate64(int descriptor, off64_t size) {
    GUARD(is_file_inside(descriptor), 1)
    return syscall(SYS_ftruncate, descriptor, size);
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }
int posix_fallocate64(int descriptor, off64_t offset, off64_t size) {
    if (is_file_inside(descriptor)) {
        int error = failing(1);
        if (error) return error;
    }
    return syscall(SYS_fallocate, descriptor, 0, offset, size) ? errno : 0;
}
int posix_fallocate(int descriptor, off_t offset, off_t size) { return posix_fallocate64(descriptor, offset, size); }
