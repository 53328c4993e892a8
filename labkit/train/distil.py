"""Distillation losses: a student learns from a teacher's answers, probabilities, hidden states or attention.

Every loss is a sum over the positions that count, so that the loop can divide by their number. Teacher and student must have the
same token ids (`check_same_tokens`): a probability has no meaning under another vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.checkpoint import Checkpoint
from labkit.train.llama import Llama
from labkit.train.loop import Loss
from labkit.train.rows import Rows
from labkit.types import LabkitError


def hard(student: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with the given tokens, nats. student (B, T, V) logits; targets, weights (B, T)."""
    return (F.cross_entropy(student.float().flatten(0, 1), targets.flatten(), reduction="none") * weights.flatten()).sum()


def soft(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(teacher || student) of the probabilities at temperature T, nats (Hinton et al. 2015, arXiv:1503.02531).

    Gradients of softened probabilities shrink as 1 / T^2; the factor keeps them in proportion to the hard loss.
    """
    _check(temperature)
    p, q = (F.log_softmax(x.float() / temperature, -1) for x in (teacher, student))
    return temperature**2 * ((p.exp() * (p - q)).sum(-1) * weights).sum()


def reverse(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher): punishes what the teacher would never say (MiniLLM, Gu et al. 2023, arXiv:2306.08543)."""
    return soft(teacher, student, weights, temperature)


def jensen(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 1.0, share: float = 0.5) -> Tensor:
    """T^2 (share KL(teacher || mix) + (1 - share) KL(student || mix)), mix = share teacher + (1 - share) student.

    The generalized Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649).
    """
    _check(temperature)
    p, q = (F.log_softmax(x.float() / temperature, -1) for x in (teacher, student))
    ends = torch.tensor([share, 1 - share]).log()
    mix = torch.logsumexp(torch.stack((p + ends[0], q + ends[1])), 0)
    parts = share * (p.exp() * (p - mix)).sum(-1) + (1 - share) * (q.exp() * (q - mix)).sum(-1)
    return temperature**2 * (parts * weights).sum()


DIVERGENCES = {"forward": soft, "reverse": reverse, "jensen": jensen}


@dataclass(frozen=True)
class Taught(Rows):
    """Rows with the teacher's logits beside them, (B, T, V) float16, each position's less its largest."""

    logits: Tensor

    def __getitem__(self, some: slice | Tensor) -> Taught:
        return Taught(*(part[some] for part in (self.ids, self.targets, self.weights, self.documents, self.logits)))


@torch.no_grad()
def remember(teacher: Llama | Sequence[Llama], rows: Rows, *, temperature: float = 1.0, size: int = 16) -> Taught:
    """Ask the teacher once, `size` rows at a time, so that no step of a student's training has to run it.

    Needs 2 bytes a position and vocabulary entry. Taking the largest logit off changes no probability, and puts the likely
    tokens where float16 is finest. Several teachers count as their mean probability at `temperature`.
    """
    teachers = _several(teacher)
    found = torch.empty((*rows.ids.shape, teachers[0].shape.vocab_size), dtype=torch.float16)
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        logits = mean_logits([t(part.ids, documents=part.documents) for t in teachers], temperature)
        found[at : at + size] = logits - logits.amax(-1, keepdim=True)
    return Taught(rows.ids, rows.targets, rows.weights, rows.documents, found)


def response(teacher: Llama | Sequence[Llama] | None = None, temperature: float = 2.0, share: float = 0.5,
             divergence: str = "forward") -> Loss:  # fmt: skip
    """A loss for `train`: (1 - share) hard targets + share divergence from the teacher (several: from their mean probability).

    Rows that were `Taught` bring the teacher's logits with them; for others give the teacher, which then runs at every step.
    """
    teachers = _several(teacher)
    if divergence not in DIVERGENCES or not 0 <= share <= 1:
        raise LabkitError(
            f"divergence={divergence!r}, share={share} given; expected {', '.join(DIVERGENCES)} and a share from 0 to 1."
        )

    def loss(student: nn.Module, rows: Rows) -> Tensor:
        logits = student(rows.ids, documents=rows.documents)
        theirs = _theirs(teachers, rows, temperature)
        if theirs.shape != logits.shape:
            raise LabkitError(
                f"The teacher has {theirs.shape[-1]} logits and the student {logits.shape[-1]}; they need one tokenizer."
            )
        part = DIVERGENCES[divergence](logits, theirs, rows.weights, temperature)
        return (1 - share) * hard(logits, rows.targets, rows.weights) + share * part

    return loss


def _several(teacher: Llama | Sequence[Llama] | None) -> list[Llama]:
    return [] if teacher is None else [teacher] if isinstance(teacher, nn.Module) else list(teacher)


@torch.no_grad()
def _theirs(teachers: Sequence[Llama], rows: Rows, temperature: float) -> Tensor:
    """The teachers' logits (B, T, V): remembered ones, else computed."""
    if teachers:
        return mean_logits([t(rows.ids, documents=rows.documents) for t in teachers], temperature)
    if not isinstance(rows, Taught):
        raise LabkitError("Rows without a teacher's logits given, and no teacher; expected one of both: remember(teacher, rows).")
    return rows.logits.float()


def mean_logits(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Logits whose softmax at `temperature` is the mean of the teachers' probabilities at that temperature."""
    if len(logits) == 1:
        return logits[0]
    at = torch.stack([F.log_softmax(x.float() / temperature, -1) for x in logits])
    return temperature * (torch.logsumexp(at, 0) - torch.tensor(float(len(logits))).log())


class Transfer(nn.Module):
    """A loss for `train` that adds hidden states and attention to another loss; its projections are trained with the student.

    layers: pairs (student, teacher) of `Llama.states` entries, 0 being the embedding. Hidden states are compared after a linear
    map to the teacher's width, as squared error over the teacher's mean square (FitNets, Romero et al. 2014, arXiv:1412.6550).
    Attention is KL between the heads' mean shares (after TinyBERT, Jiao et al. 2019, arXiv:1909.10351); layer 0 has none.
    """

    def __init__(self, student: Llama, teacher: Llama, inner: Loss, layers: Sequence[tuple[int, int]], hidden: float = 1.0,
                 attention: float = 0.0):  # fmt: skip
        super().__init__()
        most = student.shape.num_hidden_layers, teacher.shape.num_hidden_layers
        if not layers or any(not 0 <= i <= m for pair in layers for i, m in zip(pair, most, strict=True)):
            raise LabkitError(f"layers={list(layers)} given; expected pairs from (0, 0) to {most}.")
        self.inner, self.layers, self.hidden, self.attention = inner, list(layers), hidden, attention
        object.__setattr__(self, "teacher", teacher)  # not a submodule: it is not trained
        widths = student.shape.hidden_size, teacher.shape.hidden_size
        self.maps = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in layers)

    def forward(self, student: Llama, rows: Rows) -> Tensor:
        with watched(student) as mine:
            ours = student.states(rows.ids, documents=rows.documents)
        with torch.no_grad(), watched(self.teacher) as other:
            theirs = self.teacher.states(rows.ids, documents=rows.documents)
        total = self.inner(student, rows)
        for (s, t), change in zip(self.layers, self.maps, strict=True):
            wrong = (change(ours[s]).float() - theirs[t].float()).pow(2).mean(-1) / theirs[t].float().pow(2).mean()
            total = total + self.hidden * (wrong * rows.weights).sum()
            if self.attention and s and t:
                p, q = (shares.mean(1).clamp_min(1e-9).log() for shares in (other[t - 1], mine[s - 1]))
                total = total + self.attention * ((p.exp() * (p - q)).sum(-1) * rows.weights).sum()
        return total


@contextmanager
def watched(model: Llama) -> Iterator[list[Tensor]]:
    """Collect the attention shares (B, H, T, T) of every layer, in order, of a forward pass meanwhile."""
    found: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.watch = found
    try:
        yield found
    finally:
        for layer in model.model.layers:
            layer.self_attn.watch = None


def check_same_tokens(student: Checkpoint, teacher: Checkpoint) -> None:
    """LabkitError when the two checkpoints do not give the same ids to the same tokens."""
    ours, theirs = (c.tokenizer.get_vocab(with_added_tokens=True) for c in (student, teacher))
    if ours != theirs:
        odd = min((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
        raise LabkitError(
            f"{student.name} and {teacher.name} number tokens differently ({odd!r} is {ours.get(odd)} and {theirs.get(odd)}); "
            "distil from the teacher's answers (synthesize) instead of its probabilities."
        )


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise LabkitError(f"temperature={temperature} given; expected a number above 0.")
