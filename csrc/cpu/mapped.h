// Memory that the system can have back: pages of files that are mapped, as weights are that were loaded from
// safetensors files, and what was freed.
#pragma once

#include <cstdint>

namespace cerberus {

// Gives back to the system the whole pages of the memory that are as in the file that they are mapped from:
// whoever reads them again gets them from there, to the bit. Pages that were written to, and memory that is
// of no file, stay. Nobody may write to the memory meanwhile. Returns the bytes given back; 0 where the
// system does not tell which pages are a file's.
int64_t release_mapped_cpu(void* memory, int64_t bytes);

// What the process has freed, but the C library keeps for later; where that is glibc.
void trim_heap_cpu();

}  // namespace cerberus
