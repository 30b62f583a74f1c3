// The CPU kernels, below the choice of the instruction set. No torch.
#pragma once

#include <string>

#include "args.h"
#include "cpu/parallel.h"

namespace cerberus {

void hidden_entropy_cpu(const HiddenEntropyArgs& args, const Parallel& parallel);
void head_stack_cpu(const HeadStackArgs& args, const Parallel& parallel);
void draft_topk_cpu(const DraftTopkArgs& args, const Parallel& parallel);
void choose_tokens_cpu(const ChooseTokensArgs& args, const Parallel& parallel);
void tree_attention_cpu(const TreeAttentionArgs& args, const Parallel& parallel);
void write_cache_cpu(const WriteCacheArgs& args, const Parallel& parallel);
void verify_tree_cpu(const VerifyTreeArgs& args, const Parallel& parallel);
void commit_cache_cpu(const CommitCacheArgs& args, const Parallel& parallel);
void linear_cpu(const LinearArgs& args, const Parallel& parallel);
void activation_cpu(const ActivationArgs& args, const Parallel& parallel);

// Into how many parts draft_topk splits a vocabulary of that size: by the size alone, so that a row's bits
// depend neither on the other rows nor on the number of threads.
int64_t draft_topk_parts_cpu(int64_t vocab);

// The level of the instruction set that the kernels use: the best one of this CPU, or CERBERUS_ISA where
// that is set. Throws std::runtime_error if CERBERUS_ISA names none that runs here.
std::string cpu_isa();

}  // namespace cerberus
