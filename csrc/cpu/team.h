// The threads that steps run on: our own, which wait for each other a few hundred times per step.
//
// A waiting thread spins for some microseconds, then sleeps: the next call usually comes at once, and a core
// that another program wants is given up. Every thread has consecutive tasks, since a task asks memory for
// what the next one reads; when they are done, it takes the others'. A helper that was taken from its core
// while it held a task keeps everybody waiting: after that the caller works alone for a while.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace cerberus {

// Runs on at most `threads` threads, the caller included, and never on more than this process may use. Where
// the threads are busy with another caller's tasks, the caller does its own alone.
Parallel team(int64_t threads);

// How many of `threads` a team has: fewer where the process may use fewer processors (affinity, quota of its
// group).
int64_t team_threads(int64_t threads);

}  // namespace cerberus
