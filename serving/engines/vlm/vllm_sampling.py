"""vLLM's parameters and outputs, from and to ours."""

from __future__ import annotations

from typing import Any

from serving.engines.vlm.generation import Finish, GenerationRequest
from serving.errors import InvalidRequest


def sampling(request: GenerationRequest, every: bool) -> Any:
    """SamplingParams of a request. ``every``: an output for each step, with what is new; else one at the end.

    vLLM does not turn tokens into text here: :class:`serving.engines.vlm.detokenizer.Detokenizer` does, for both
    engines. Raises :class:`InvalidRequest` for what vLLM refuses.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    try:
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,  # this object is of this request alone
            output_kind=RequestOutputKind.DELTA if every else RequestOutputKind.FINAL_ONLY,
        )
    except VLLMClientError as error:
        raise InvalidRequest(f"vLLM refuses the request: {error}", "Change its parameters.") from error


def scoring() -> Any:
    """SamplingParams that ask for the log-probability of every token of the prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def logprobs_of(completion: Any) -> tuple[float, ...]:
    """Log-probability of each token of a completion: the sampled token is the first of its position."""
    flat = completion.logprobs
    return tuple(flat.logprobs[start] for start in flat.start_indices) if flat else ()


def finish_of(reason: str | None) -> Finish:
    """Why a completion ended."""
    return "" if reason is None else "stop" if reason == "stop" else "length"
