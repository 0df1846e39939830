"""What runs inside vLLM's own workers: `--worker-extension-cls ale.policy.vllm_worker.WeightLoader`.

vLLM mixes the class into its worker; its methods are called by `/collective_rpc`.
"""

from __future__ import annotations

from typing import Any

from ale.policy.vllm_launch import end_with_parent

end_with_parent()  # the engine's process too, where the server is ours


class WeightLoader:
    """The methods of a worker that `ale` asks for."""

    model_runner: Any

    def ale_load_weights(self, path: str) -> None:
        """Takes the weights of a Hugging Face directory, in place."""
        self.model_runner.reload_weights(weights_path=path)
        head = _packed_head(self.model_runner.model)
        if head is not None:
            # vLLM's reload packs every layer that it loads again, and a tied head is loaded with the embedding: on CPU
            # it would keep its packed copy of the old weights and sample from a mixture of two policies, silently.
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _packed_head(model: Any) -> Any | None:
    """The head of a model on CPU, where it multiplies with a packed copy of its weight."""
    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is None or weight.device.type != "cpu" or not hasattr(head, "cpu_linear"):
        return None
    return head
