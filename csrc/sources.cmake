# The ops, each of a file of its name: csrc/cuda/<op>.cu and csrc/cpu/<op>.cpp. For the build and for the emulation.
# Those that take longest to compile come first.
set(CUDA_OPS tree_attention choose_tokens draft_topk head_stack hidden_entropy rerank write_cache verify_tree
             commit_cache)
# Kernels of a step that is replayed on CUDA (csrc/step/device_step.h), built the same way.
set(CUDA_STEP step_product step_grouped step_rows)

# What is compiled for each level of the instruction set, so that dispatch.cpp finds it there.
set(CPU_PRODUCTS gemm linear eight_bits draft_topk head_stack tree_attention)
set(CPU_KERNELS ${CPU_PRODUCTS} choose_tokens activation hidden_entropy rerank rows)
set(CPU_MOVES write_cache verify_tree commit_cache grouped_linear draft)  # vectors gain nothing here: level portable alone
