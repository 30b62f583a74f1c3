# The ops, each of a file of its name: csrc/cuda/<op>.cu and csrc/cpu/<op>.cpp. For the build and for the emulation.
set(CUDA_OPS hidden_entropy head_stack draft_topk choose_tokens tree_attention write_cache verify_tree commit_cache)
set(CPU_OPS ${CUDA_OPS} linear activation)  # linear.cpp: grouped_linear, too
