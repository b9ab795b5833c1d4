// Preloaded, ends the process at its n-th change of a file: before, half-way through or after it.

#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {
long number = -1;  // of the moment to die at; three to each change
long count = 0;
bool counting = false;

template <class Function>
Function next(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

void die_if(long moment) {
    if (counting && number == moment) _exit(9);
}

// A change that is made whole or not at all.
template <class Change>
auto change(Change make) {
    const long first = counting ? 3 * count++ : 0;
    die_if(first);
    auto result = make();
    die_if(first + 1);
    die_if(first + 2);
    return result;
}

bool is_file(int descriptor) {
    struct stat found;
    return descriptor > STDERR_FILENO && fstat(descriptor, &found) == 0 && S_ISREG(found.st_mode);
}
}  // namespace

extern "C" {
void die_at(long moment) {
    number = moment;
    count = 0;
    counting = true;
}

long changes() { return count; }

ssize_t write(int descriptor, const void* buffer, size_t size) {
    static auto call = next<ssize_t (*)(int, const void*, size_t)>("write");
    if (!counting || !is_file(descriptor)) return call(descriptor, buffer, size);
    const long first = 3 * count++;
    die_if(first);
    if (number == first + 1) (void)!call(descriptor, buffer, size / 2);
    die_if(first + 1);
    const ssize_t written = call(descriptor, buffer, size);
    die_if(first + 2);
    return written;
}

#define OPEN(NAME)                                                                   \
    int NAME(const char* path, int flags, ...) {                                     \
        static auto call = next<int (*)(const char*, int, ...)>(#NAME);              \
        va_list rest;                                                                \
        va_start(rest, flags);                                                       \
        const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;              \
        va_end(rest);                                                                \
        if (!(flags & (O_CREAT | O_TRUNC))) return call(path, flags, mode);          \
        return change([&] { return call(path, flags, mode); });                      \
    }
OPEN(open)
OPEN(open64)

#define CHANGE(NAME, PARAMETERS, ...)                                                \
    int NAME PARAMETERS {                                                            \
        static auto call = next<int (*) PARAMETERS>(#NAME);                          \
        return change([&] { return call(__VA_ARGS__); });                            \
    }
CHANGE(fsync, (int descriptor), descriptor)
CHANGE(ftruncate, (int descriptor, off_t size), descriptor, size)
CHANGE(ftruncate64, (int descriptor, off64_t size), descriptor, size)
CHANGE(rename, (const char* from, const char* to), from, to)
CHANGE(mkdir, (const char* path, mode_t mode), path, mode)
CHANGE(unlink, (const char* path), path)
CHANGE(unlinkat, (int folder, const char* path, int flags), folder, path, flags)
CHANGE(rmdir, (const char* path), path)
}
