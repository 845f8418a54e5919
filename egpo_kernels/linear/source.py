"""Hidden states and an output layer as what a loss is computed from."""

from reprlib import repr as shown
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels import reference
from egpo_kernels.config.fields import check_number
from egpo_kernels.config.results import Rows, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.engine import calls
from egpo_kernels.engine.logits import reference_scores
from egpo_kernels.engine.rows import Unmade
from egpo_kernels.engine.support import read_support, with_support
from egpo_kernels.inputs import layout as layouts
from egpo_kernels.inputs.segments import flat
from egpo_kernels.inputs.validation import check_dense, check_tensor, check_whole
from egpo_kernels.linear import autograd
from egpo_kernels.linear.chunks import check_num_active
from egpo_kernels.linear.head import Head
from egpo_kernels.linear.split import read_split
from egpo_kernels.parallel import reading
from egpo_kernels.parallel.hidden import check_parts, gathered, with_summed_gradient
from egpo_kernels.parallel.shard import Shard


class Linear(NamedTuple):
    """Hidden states ``[B, T, H]``, the head, and what is known on the host: how many rows count, that none ``records``
    what a sampler kept. Where the head has some columns of the vocabulary, also which, and whether the gradient of
    hidden states is summed over ranks.
    """

    hidden: Tensor
    head: Head
    host_mask: Tensor | None
    num_active: int | None
    max_chunk_bytes: int | None
    shard: Shard | None
    adds_up: bool
    statuses: list[Tensor]
    records: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states, in which the gradient must fit."""
        return self.hidden.dtype

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.head.vocab if self.shard is None else self.shard.vocab

    @property
    def late(self) -> bool:
        """A chunk's gradient is made while its logits are there, after an exchange with other ranks too."""
        return False

    @property
    def requires_grad(self) -> bool:
        """Whether anything is differentiated."""
        return any(self.wanted)

    @property
    def wanted(self) -> tuple[bool, ...]:
        """Which of hidden states, weight, bias and both adapters are differentiated."""
        tensors = (self.hidden, *self.head[:4])
        return tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors)

    def log_probs(self, call: calls.Call, rows: Rows, want_entropy: bool, entropy_gradient: bool) -> TokenLogProbs:
        """See `egpo_kernels.engine.calls.Source`."""
        if call.backend == "reference":
            return self._reference(call, rows, want_entropy)
        frozen = self.wanted[0] and not any(self.wanted[1:])
        log_probs, entropy, *status = autograd.TokenLogProbs.apply(
            self.hidden,
            *self.head[:4],
            (call.temperature, *self.head[4:7]),
            self._sizes(),
            want_entropy,
            frozen and not entropy_gradient,
            self.wanted,
            call.backend,
            self.host_mask,
            *rows,
            *self._kept(call),
        )
        self.statuses.extend(status)
        return TokenLogProbs(log_probs, entropy if want_entropy else None)

    def _reference(self, call: calls.Call, rows: Rows, want_entropy: bool) -> TokenLogProbs:
        check_num_active(rows.mask, self.num_active)
        hidden, head, shard = self.hidden, self.head, self.shard
        if shard is not None:
            if self.adds_up:
                hidden = with_summed_gradient(hidden, shard)
            if head.lora_a is not None:
                head = head._replace(lora_a=with_summed_gradient(head.lora_a, shard))
        logits = reference.linear_logits(hidden, *head, mask=flat(rows.mask))
        log_probs, entropy = reference_scores(logits, call, rows, shard, self.statuses)
        return TokenLogProbs(log_probs, entropy if want_entropy else None)

    def _sizes(self) -> tuple[Any, ...]:
        shard = "" if self.shard is None else self.shard.text
        return (self.num_active, self.max_chunk_bytes, self.head.logits_dtype, shard, self.adds_up)

    def _kept(self, call: calls.Call) -> tuple[Tensor, ...]:
        return call.support if self.records else ()

    def loss(
        self,
        call: calls.Call,
        unmade: Unmade,
        config: PolicyLossConfig,
        scale: float,
        want_entropy: bool,
        reported: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `egpo_kernels.engine.calls.Source`."""
        tensors, how = unmade.operands()
        loss, vector, *status = autograd.PolicyLoss.apply(
            self.hidden,
            *self.head[:4],
            (call.temperature, *self.head[4:7]),
            self._sizes(),
            how,
            scale,
            want_entropy,
            reported,
            self.wanted,
            call.backend,
            self.host_mask,
            *tensors,
            *self._kept(call),
        )
        self.statuses.extend(status)
        return loss, vector


class Given(NamedTuple):
    """What the public functions take beside what `logits_policy_loss` takes, as the caller gave it."""

    hidden: Any
    weight: Any
    bias: Any
    lora: Any
    logit_scale: Any
    logit_softcap: Any
    num_active: Any
    max_chunk_bytes: Any
    logits_dtype: Any
    columns: reading.Given = reading.NOTHING
    hidden_grad: Any = None
    sequence_parallel: Any = False


def read_hidden(
    given: Given,
    tokens: Any,
    mask: Any,
    cu_seqlens: Any,
    temperature: Any,
    support: Any,
    backend: str,
    one_sequence: bool = False,
) -> calls.Call:
    """Check hidden states, head, tokens, mask, temperature and what a sampler kept."""
    packed = cu_seqlens is not None or one_sequence
    # These decide how many exchanges there are.
    told = (support is None, *given[6:9], given.hidden_grad, given.sequence_parallel)
    columns = given.columns._replace(options=(*given.columns.options, *told))
    split = read_split(*given[:4], columns, given.hidden_grad, given.sequence_parallel)
    given, shard = given._replace(weight=split.weight, bias=split.bias, lora=split.lora), split.shard
    hidden = check_dense("hidden", split.hidden, "floating")
    hidden = check_tensor("hidden", hidden, "floating", {}, hidden.device)
    if hidden.dim() != (2 if packed else 3):
        wanted = "[N, H] with cu_seqlens" if packed else "[S, T, H] (or [N, H] with cu_seqlens)"
        raise ValueError(f"hidden has shape {list(hidden.shape)}; it must be {wanted}")
    if split.hidden_grad == "reduce_scatter" and shard is not None:
        check_parts(hidden, tokens, shard)
        hidden = gathered(hidden, shard)
    shape, device = tuple(hidden.shape[:-1]), hidden.device
    hidden, head = _read_head(given, hidden, may_be_empty=shard is not None)
    if one_sequence:
        layout = layouts.one_sequence(shape, device)
    else:
        layout = layouts.make_layout("hidden", shape, cu_seqlens, device)
    host_mask = None
    if isinstance(mask, Tensor) and mask.device.type == "cpu" != device.type:
        host_mask = check_tensor("mask", mask, "real", {"tokens' shape": shape}, mask.device).reshape(-1) != 0
        wanted = "it must be on hidden's device there: pass it so, with num_active"
        mask = layouts.to_device("mask", host_mask, device, wanted).view(shape)
    limits = (host_mask, check_whole("num_active", given.num_active, 0))
    max_chunk_bytes = check_whole("max_chunk_bytes", given.max_chunk_bytes, 1)
    adds_up = shard is not None and split.hidden_grad == "all_reduce"
    source = Linear(hidden.unsqueeze(0) if packed else hidden, head, *limits, max_chunk_bytes, shard, adds_up, [])
    call = calls.read_tokens(source, layout, tokens, mask, temperature, backend)
    if support is None:
        return call
    read = read_support(support, layout)
    return with_support(call, read)._replace(source=_multiplied(source, call, read.recorded))


def _multiplied(source: Linear, call: calls.Call, recorded: Tensor | None) -> Linear:
    """The source with what the host knows of the rows that meet all of the output layer: those without a record."""
    if recorded is None or call.backend == "reference" or torch.compiler.is_compiling():
        return source
    if source.shard is not None:
        return source  # what this rank's host knows may be news to another's, which must do the same
    if not recorded.any():
        return source._replace(records=False)
    mask, num_active = source.host_mask, source.num_active
    if recorded.device == call.layout.device:
        mask = call.given.counted(call.layout).reshape(-1)
    if mask is not None:
        check_num_active(mask, num_active)
        num_active = None
    others = ~recorded if mask is None else mask & ~recorded
    count = int(others.sum())
    if num_active is None or num_active > count:
        return source._replace(host_mask=others, num_active=count)
    return source


def _read_head(given: Given, hidden: Tensor, may_be_empty: bool) -> tuple[Tensor, Head]:
    """Check the head and bring it and hidden states to one dtype: autocast's, where that is on."""
    weight = check_dense("weight", given.weight, "floating")
    width = hidden.shape[-1]
    if weight.dim() != 2 or not (may_be_empty or weight.shape[0]) or weight.shape[1] != width:
        raise ValueError(
            f"weight is a {type(weight).__name__} of shape {list(weight.shape)}; it must be a whole [V, H] with H = "
            f"{width}, as in hidden: transpose it, or, where it is sharded, call this inside the model's forward"
        )
    vocab = weight.shape[0]
    lora_a, lora_b, lora_scale = (None, None, 1.0) if given.lora is None else _read_lora(given.lora, vocab, width)
    tensors = {"weight": weight, "bias": given.bias, "lora[0]": lora_a, "lora[1]": lora_b}
    if given.bias is not None:
        check_tensor("bias", given.bias, "floating", {"[V], of weight's rows,": (vocab,)}, hidden.device)
    converts = _autocast_dtype(hidden, given.logits_dtype) is not None
    hidden, dtype = _product_dtype(hidden, weight.dtype, given.logits_dtype)
    for name, tensor in tensors.items():
        if tensor is not None:
            tensors[name] = check_tensor(name, tensor.to(dtype) if converts else tensor, "floating", {}, hidden.device)
            if tensors[name].dtype != dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype} like hidden: convert one of them")
    weight = tensors["weight"]
    # They divide the temperature: within these bounds float32 holds an ordinary one afterwards.
    scale = check_number("logit_scale", given.logit_scale, low=1e-6, high=1e6)
    cap = check_number("logit_softcap", given.logit_softcap, low=1e-6, high=1e6, optional=True)
    assert scale is not None
    bias, lora_a, lora_b = (tensors[name] for name in ("bias", "lora[0]", "lora[1]"))
    logits_dtype = dtype if given.logits_dtype is None else given.logits_dtype
    return hidden, Head(weight, bias, lora_a, lora_b, lora_scale, scale, cap or 0.0, logits_dtype)


def _autocast_dtype(hidden: Tensor, logits_dtype: Any) -> torch.dtype | None:
    """What autocast makes of hidden states and head; who asks for a dtype of logits has said it already."""
    kind = hidden.device.type
    if logits_dtype is not None or hidden.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _product_dtype(hidden: Tensor, weight: torch.dtype, logits_dtype: Any) -> tuple[Tensor, torch.dtype]:
    """Hidden states, and the dtype that the head must have.

    With float32 logits of 16-bit hidden states the head may be float32 too: a chunk of hidden states is converted.
    """
    if logits_dtype is None:
        dtype = _autocast_dtype(hidden, None) or hidden.dtype
        return hidden.to(dtype), dtype
    if logits_dtype != torch.float32 or hidden.dtype == torch.float64:
        raise ValueError(
            f"logits_dtype is {shown(logits_dtype)} with hidden of {hidden.dtype}; it must be torch.float32, with "
            "hidden states of no more than 32 bits, or None"
        )
    if _autocast_dtype(hidden, None) is not None and weight.itemsize < 4:
        hidden = hidden.to(weight)  # norms give float32 there
    return hidden, torch.float32 if weight == torch.float32 else hidden.dtype


def _read_lora(lora: Any, vocab: int, width: int) -> tuple[Tensor, Tensor, float]:
    """Check adapters ``(A, B, scale)``."""
    wanted = "it must be (A, B, scale) with A [r, H] and B [V, r], or None"
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"lora is {shown(lora)}; {wanted}")
    lora_a, lora_b = (check_dense(f"lora[{number}]", lora[number], "floating") for number in (0, 1))
    rank = lora_a.shape[0] if lora_a.dim() == 2 else 0
    if lora_a.shape != (rank, width) or lora_b.shape != (vocab, rank):
        raise ValueError(
            f"lora has A {list(lora_a.shape)} and B {list(lora_b.shape)}; it must be A [r, {width}] and B [{vocab}, r]"
        )
    scale = check_number("lora[2]", lora[2], low=-1e6, high=1e6)
    assert scale is not None
    return lora_a, lora_b, scale
