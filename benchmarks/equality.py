"""Loss and gradient of the fast path against the plain one, on real rows of a job, in float32 or float64.

Argument: a job as JSON whose precision is float32 or float64.

Fast: the engine's own step (rows packed, output layer in chunks, one pass). Plain: padded rows, the model's own logits for every
position, the loss written out below, torch's autograd. Two changes make the comparison sharp: advantages are raised by one, so that the
loss is no sum that cancels, and the reference's log-probs are moved by noise of 0.1, so that the KL term has a gradient.

transformers' Llama computes its RMS norm in float32 whatever the model's dtype, which rounds a float64 model to 1e-7. For the float64
comparison only, both paths get a norm that keeps float64.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from channel import Answers
from workloads import BETA, Job

ROWS = 8  # compared; float64 is slow
TOKENS = 16  # of each response
EPS = 0.2  # clipping range


class Silent:
    """A record that keeps nothing."""

    def count(self, *_: Any, **__: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def experience(job: Job, run: Any) -> Any:
    """Rows of whole groups as an update gets them, shortened to TOKENS new tokens."""
    import torch

    exp = next(run.source)
    exp = run.annotate(run.select(run.score(exp)))
    exp = exp.rows(torch.arange(min(len(exp), max(ROWS, job.workload.samples))))
    nth = exp.mask.cumsum(-1)
    real = exp.attention & (nth <= TOKENS)
    exp = replace(exp, attention=real, mask=exp.mask & real, ids=exp.ids * real)
    exp = run.credit(run.shape(exp))
    g = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(exp.ids.shape, generator=g)
    return replace(
        exp, advantage=(exp.advantage + 1) * exp.mask, ref_logp=(exp.ref_logp + noise) * exp.mask, old_logp=None
    )


def fast(engine: Any, update: Any, exp: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the engine's step, read by hooks; a learning rate of 0 leaves the weights as they are."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(grad: Any) -> None:
            found[name] = found[name] + grad if name in found else grad.clone()

        return hook

    named = [(n.removeprefix("model."), p) for n, p in engine.module.named_parameters() if p.requires_grad]
    hooks = [p.register_hook(keep(n)) for n, p in named]
    loss = engine.step(exp, update, lr=0.0)["loss"]
    for h in hooks:
        h.remove()
    return loss, found


def plain(model: Any, exp: Any) -> tuple[float, dict[str, Any]]:
    """GRPO with the k3 penalty on padded rows, written out; two rows at a time, since the mean over rows splits."""
    import torch

    loss = 0.0
    for index in torch.arange(len(exp)).split(2):
        share = row_losses(model, exp.rows(index)).sum() / len(exp)
        share.backward()
        loss += float(share.detach())
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def row_losses(model: Any, exp: Any) -> Any:
    """The mean over each row's trained tokens, [N]."""
    import torch

    device = next(model.parameters()).device
    ids, mask = exp.ids.to(device), exp.mask.to(device)[:, 1:]
    positions = (exp.attention.cumsum(-1) - 1).clamp(min=0).to(device)
    logits = model(
        input_ids=ids, attention_mask=exp.attention.to(device), position_ids=positions, use_cache=False
    ).logits
    # Written out: the gradient of torch's fp32 log_softmax starts from rounded log-probs and is eight times less exact.
    picked = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    logp = picked - logits[:, :-1].logsumexp(-1)
    advantage, reference = exp.advantage[:, 1:].to(logp), exp.ref_logp[:, 1:].to(logp)
    ratio = (logp - logp.detach()).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1 - EPS, 1 + EPS) * advantage)
    gap = reference - logp
    values = surrogate + BETA * (gap.exp() - 1 - gap)
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


def wide_norm(model: Any) -> None:
    """Replace every RMS norm's forward by one that keeps the input's dtype."""
    import types

    import torch

    def forward(self: Any, x: Any) -> Any:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.forward = types.MethodType(forward, m)


def gaps(one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]]) -> dict[str, Any]:
    """Relative differences: of the loss, of the whole gradient (2-norm), and the largest of any one parameter's."""
    (a, first), (b, second) = one, other
    assert first.keys() == second.keys(), f"parameters differ: {sorted(first.keys() ^ second.keys())[:4]}"
    off = {n: float((first[n].double() - second[n].double()).norm()) for n in first}
    size = {n: float(second[n].double().norm()) for n in second}
    total = sum(v * v for v in size.values()) ** 0.5
    worst = max((n for n in off if size[n] > 0), key=lambda n: off[n] / size[n])
    return {
        "loss": abs(a - b) / abs(b),
        "gradient": sum(v * v for v in off.values()) ** 0.5 / total,
        "worst_parameter": off[worst] / size[worst],
        "worst_name": worst,
        "loss_value": b,
        "gradient_norm": total,
    }


def copy_of(engine: Any) -> Any:
    """A plain model with the engine's weights."""
    import copy

    model = copy.deepcopy(engine.module.model).eval()
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("sdpa")
    for p in model.parameters():
        p.grad = None
    return model


def main() -> None:
    job, answers = Job.loads(sys.argv[1]), Answers()
    from ours import make

    run, parts, _ = make(replace(job, precision="fp32", extra=(*job.extra, "optim.clip=0")), Silent())
    engine, update = parts.engines["policy"], run.updates["policy"]
    exp = experience(job, run)
    if job.precision == "float64":
        engine.module.double()
        engine.engine.enable_backward_allreduce = (
            False  # one process has nothing to reduce, and DeepSpeed refuses to in float64
        )
        wide_norm(engine.module)
    model = copy_of(engine)
    dtype = str(next(model.parameters()).dtype)
    one, other = fast(engine, update, exp), plain(model, exp)
    found = {"rows": len(exp), "tokens": int(exp.mask.sum()), "dtype": dtype, **gaps(one, other)}
    if job.precision == "float32":  # how far rounding alone takes either path
        wide = copy_of(engine).double()
        wide_norm(wide)
        truth = plain(wide, exp)
        found |= {"fast_against_float64": gaps(one, truth), "plain_against_float64": gaps(other, truth)}
    answers.send(found)


if __name__ == "__main__":
    main()
