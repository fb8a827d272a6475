/* Storage that fails: while the file $STORAGE_FAILS exists, opening and renaming what lies under $STORAGE is EIO.
 *
 *     cc -shared -fPIC -o storage_fails.so storage_fails.c -ldl
 *     STORAGE=/shared/out STORAGE_FAILS=/shared/storage-fails LD_PRELOAD=storage_fails.so command
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int fails(const char *path) {
  const char *storage = getenv("STORAGE"), *mark = getenv("STORAGE_FAILS");
  if (!path || !storage || !mark || strncmp(path, storage, strlen(storage)) != 0) return 0;
  int before = errno;
  if (access(mark, F_OK) == 0) {
    errno = EIO;
    return 1;
  }
  errno = before;
  return 0;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }

int open(const char *path, int flags, ...) {
  MODE(flags)
  return fails(path) ? -1 : NEXT(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  MODE(flags)
  return fails(path) ? -1 : NEXT(open64)(path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return fails(path) ? -1 : NEXT(openat)(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return fails(path) ? -1 : NEXT(openat64)(folder, path, flags, mode);
}

int rename(const char *from, const char *to) { return fails(to) ? -1 : NEXT(rename)(from, to); }

int mkdir(const char *path, mode_t mode) {
  int (*next)(const char *, mode_t) = (int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir");
  return fails(path) ? -1 : next(path, mode);
}
