"""For vLLM's speculative method `custom_class`: `cerberus_ext.vllm.SuffixProposer`. docs/serving.md has the command."""

from .proposer import SuffixProposer

__all__ = ["SuffixProposer"]
