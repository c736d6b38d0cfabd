/* Files of a folder that somebody else may have written. */
#include "Open.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static bool is_plain(const char *name) {
  return *name && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

/* The path behind a descriptor; false if the system does not tell. */
static bool path_of(int fd, char path[PATH_MAX]) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  if (n <= 0)
    return false;
  path[n] = 0;
  return true;
}

static bool inside(const char *path, const char *folder, size_t n) {
  return !strncmp(path, folder, n) && path[n] == '/';
}

/* A symlink may lead to a file of the same folder, or, in a snapshot of a Hugging Face cache, to a
   blob of the same repository. */
static bool link_allowed(int folder, int fd) {
  char root[PATH_MAX], path[PATH_MAX];
  if (!path_of(folder, root) || !path_of(fd, path))
    return false;
  if (inside(path, root, strlen(root)))
    return true;
  char *snapshots = NULL; /* the last, as the cache may itself be in a folder of this name */
  for (char *at = root; (at = strstr(at, "/snapshots/")); ++at)
    snapshots = at;
  if (!snapshots)
    return false;
  size_t n = (size_t)(snapshots - root);
  return inside(path, root, n) && !strncmp(path + n, "/blobs/", 7);
}

int moec_open_member(int folder, const char *path, const char *name, const char *where,
                     struct stat *st, moec_error *error, int *code) {
  if (!is_plain(name)) {
    *code = moec_fail(error, MOEC_E_PATH, "%s: %s: expected a plain file name, but got \"%s\"",
                      where, path, name);
    return -1;
  }
  int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  int fd = openat(folder, name, flags | O_NOFOLLOW);
  bool link = fd < 0 && errno == ELOOP;
  if (link)
    fd = openat(folder, name, flags);
  if (fd < 0 || fstat(fd, st)) {
    *code = moec_fail(error, errno == ENOMEM ? MOEC_E_MEMORY : MOEC_E_IO,
                      "%s: %s/%s: expected a readable file, but got: %s", where, path, name,
                      strerrordesc_np(errno));
  } else if (!S_ISREG(st->st_mode)) {
    *code = moec_fail(error, MOEC_E_PATH, "%s: %s/%s: expected a regular file, but got %s", where,
                      path, name, S_ISDIR(st->st_mode) ? "a folder" : "a special file");
  } else if (link && !link_allowed(folder, fd)) {
    *code = moec_fail(error, MOEC_E_PATH,
                      "%s: %s/%s: expected a file of the folder, but got a link that leaves it",
                      where, path, name);
  } else {
    return fd;
  }
  if (fd >= 0)
    close(fd);
  return -1;
}

int moec_read_all(int fd, void *to, uint64_t bytes, uint64_t offset) {
  while (bytes) {
    size_t step = bytes < (64u << 20) ? (size_t)bytes : 64u << 20;
    ssize_t n = pread(fd, to, step, (off_t)offset);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return n ? errno : -1;
    to = (char *)to + n;
    offset += (uint64_t)n;
    bytes -= (uint64_t)n;
  }
  return 0;
}

int moec_check_elf(const char *where, const char *path, const char *name, int fd, uint64_t size,
                   moec_error *e) {
  Elf64_Ehdr h;
  if (size < sizeof h || moec_read_all(fd, &h, sizeof h, 0) || memcmp(h.e_ident, ELFMAG, SELFMAG) ||
      h.e_type != ET_DYN)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected a shared library, but got another file", where, path,
                     name);
  if (h.e_ident[EI_CLASS] != ELFCLASS64 || h.e_machine != EM_X86_64)
    return moec_fail(e, MOEC_E_ISA, "%s: %s/%s: expected code for x86-64, but got machine %u",
                     where, path, name, h.e_machine);
  bool whole = h.e_phentsize == sizeof(Elf64_Phdr) && h.e_phoff <= size &&
               (uint64_t)h.e_phnum * sizeof(Elf64_Phdr) <= size - h.e_phoff && h.e_shoff <= size &&
               (uint64_t)h.e_shnum * h.e_shentsize <= size - h.e_shoff;
  for (int i = 0; whole && i < h.e_phnum; ++i) {
    Elf64_Phdr p;
    whole = !moec_read_all(fd, &p, sizeof p, h.e_phoff + (uint64_t)i * sizeof p) &&
            p.p_offset <= size && p.p_filesz <= size - p.p_offset;
  }
  if (!whole)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected a whole shared library, but got %llu bytes of it: the "
                     "file is truncated",
                     where, path, name, (unsigned long long)size);
  return 0;
}

int moec_find_library(const char *where, const char *dir, int fd, char name[NAME_MAX + 1],
                      moec_error *e) {
  int copy = dup(fd);
  DIR *d = copy < 0 ? NULL : fdopendir(copy);
  if (!d) {
    int cause = errno;
    if (copy >= 0)
      close(copy);
    return moec_fail(e, MOEC_E_IO, "%s: %s: expected to list the folder, but got: %s", where, dir,
                     strerrordesc_np(cause));
  }
  int found = 0;
  for (struct dirent *entry; (entry = readdir(d));) {
    size_t n = strlen(entry->d_name);
    if (n > 6 && !strncmp(entry->d_name, "lib", 3) && !strcmp(entry->d_name + n - 3, ".so")) {
      ++found;
      memcpy(name, entry->d_name, n + 1);
    }
  }
  closedir(d);
  if (found != 1)
    return moec_fail(e, MOEC_E_PATH,
                     "%s: %s: expected exactly one library lib*.so, but got %d; is it a folder "
                     "written by moec compile?",
                     where, dir, found);
  return 0;
}
