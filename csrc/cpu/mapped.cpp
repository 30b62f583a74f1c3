// Which pages are a file's, Linux tells in /proc/self/pagemap: a page that somebody has written to is none
// any more where the file is mapped privately, and one of a shared mapping stays in the file's own memory.
#include "cpu/mapped.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace cerberus {

#if defined(__linux__)

namespace {

constexpr uint64_t kPresent = uint64_t{1} << 63;
constexpr uint64_t kOfFile = uint64_t{1} << 61;
constexpr size_t kAtOnce = 1 << 12;  // pages

bool is_given(uint64_t page) { return (page & kPresent) != 0 && (page & kOfFile) != 0; }

// pages: those at `address`, as pagemap has them -> how many were given back. Runs of them at once.
int64_t release(uintptr_t address, const std::vector<uint64_t>& pages, size_t count, int64_t page) {
  int64_t released = 0;
  for (size_t begin = 0; begin < count;) {
    size_t end = begin;
    while (end < count && is_given(pages[end])) ++end;
    const size_t bytes = (end - begin) * page;
    if (bytes > 0 && madvise(reinterpret_cast<void*>(address + begin * page), bytes, MADV_DONTNEED) == 0)
      released += end - begin;
    begin = std::max(end, begin + 1);
  }
  return released;
}

}  // namespace

int64_t release_mapped_cpu(void* memory, int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page, last = (start + bytes) / page;
  const int file = first < last ? open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  int64_t released = 0;
  std::vector<uint64_t> pages(std::min<size_t>(kAtOnce, last - first));
  for (uintptr_t at = first; at < last;) {
    const size_t wanted = std::min<size_t>(pages.size(), last - at) * sizeof(uint64_t);
    const ssize_t got = pread(file, pages.data(), wanted, static_cast<off_t>(at * sizeof(uint64_t)));
    const size_t count = got > 0 ? static_cast<size_t>(got) / sizeof(uint64_t) : 0;
    if (count == 0) break;
    released += release(at * page, pages, count, page);
    at += count;
  }
  close(file);
  return released * page;
}

#else

int64_t release_mapped_cpu(void*, int64_t) { return 0; }

#endif

void trim_heap_cpu() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace cerberus
