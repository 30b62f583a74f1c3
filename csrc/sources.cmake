# The ops, each of a file of its name: csrc/cuda/<op>.cu and csrc/cpu/<op>.cpp. For the build and for the emulation.
# Those that take longest to compile come first.
set(CUDA_OPS tree_attention choose_tokens draft_topk head_stack hidden_entropy write_cache verify_tree commit_cache)
set(CPU_OPS ${CUDA_OPS} linear activation)  # linear.cpp: grouped_linear, too
