"""Policies for tasks that a run was not trained on, and the masks for these tasks.

A policy uses only a few prompt episodes of an unseen task. Observations are normalised by the mean
of the training tasks' statistics. A model with a task embedding reads the mean of the training
tasks' embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from harmodt_kernels import unpack_bits
from harmodt_kernels.vector import ParameterVector

from ..checkpoint import Checkpoint
from ..data.inputs import TaskConditioning
from ..data.store import TaskData
from ..errors import UserError
from ..masks.bank import voted_masks
from ..masks.gradients import GradientPass, TaskGradients
from ..masks.initialisation import draw_mask
from ..policies.decision import DecisionPolicy
from . import find
from .harmodt import RandomMaskLearner, RandomMaskSettings
from .learner import Setup
from .sequence import SequenceLearner, SequenceSettings

UnseenMask = Literal["voted", "none", "random", "nearest"]


@dataclass(frozen=True)
class Unseen:
    """Tasks that the run was not trained on, and the mask for them.

    Attributes:
        store: the store of the tasks. Only its prompt episodes are used.
        tasks: names or sets of tasks; by default all tasks of the store.
        mask: voted: the mask of Eq. 13. none: all weights are active. random: random weights are
            active, in each layer as many as in the voted mask. nearest: the mask of the
            training task whose gradient on its prompts agrees most with the unseen task's gradient;
            the paper has no such mask. The default is voted for a run with masks and none for a run
            without masks.
        threshold: the threshold of the voted mask, as in `vote`; by default the run's threshold.
        seed: the seed of the random mask.
    """

    store: Path
    tasks: tuple[str, ...] = ()
    mask: UnseenMask | None = None
    threshold: float | None = None
    seed: int = 0


def unseen_policy(
    setup: Setup, checkpoint: Checkpoint, unseen: Unseen, tasks: Sequence[TaskData], store: str
) -> DecisionPolicy:
    """A run's policy for tasks that it was not trained on.

    Args:
        setup: the setup of the run.
        checkpoint: a checkpoint of the run.
        unseen: the tasks and their mask.
        tasks: the data of the tasks.
        store: checksum of the store that the data come from.

    Raises:
        UserError: the run's model is not a sequence model, a mask is requested but the run has no
            masks, a task has no usable prompt episodes, the threshold is invalid, or the checkpoint
            has another model size.
    """
    if not isinstance(setup.config.own, SequenceSettings):
        raise UserError(
            f"{setup.config.algorithm} cannot act on unseen tasks (sequence models can): leave "
            "--unseen out"
        )
    masks = setup.config.own.masks if isinstance(setup.config.own, RandomMaskSettings) else None
    mask = unseen.mask or ("none" if masks is None else "voted")
    if mask != "none" and masks is None:
        raise UserError(f"{setup.config.algorithm} has no masks: evaluate it with --mask none")
    conditioning = tuple(
        TaskConditioning.of_unseen(task, setup.conditioning, setup.config) for task in tasks
    )
    bits = None
    if mask != "none":
        bits = _masks_under(mask, setup, checkpoint, unseen, conditioning)
    learner = _sequence_learner(setup, conditioning, checkpoint)
    policy = learner.policy_under(bits, checkpoint.step)
    own_threshold = unseen.threshold is not None and mask in ("voted", "random")
    policy.mask = f"{mask}>{unseen.threshold:g}" if own_threshold else mask
    policy.unseen = store
    return policy


def _masks_under(
    mask: UnseenMask,
    setup: Setup,
    checkpoint: Checkpoint,
    unseen: Unseen,
    conditioning: Sequence[TaskConditioning],
) -> Tensor:
    """Make the masks of U unseen tasks from the masks of the training tasks.

    Args:
        mask: "voted", "random" or "nearest".
        conditioning: the conditioning of the unseen tasks.

    Returns:
        int32 [L U, P_m / 32], in the form of `MaskBank.bits`.
    """
    trained = find(setup.config.algorithm).learner(setup)
    assert isinstance(trained, RandomMaskLearner)
    trained.load(checkpoint)
    bits, levels = trained.mask_bits, trained.bank.levels
    if mask == "nearest":
        nearest = nearest_tasks(setup, checkpoint, conditioning)
        return torch.cat([level[nearest] for level in bits.chunk(levels)])
    threshold = trained.unseen_threshold if unseen.threshold is None else unseen.threshold
    count = len(conditioning)
    voted = voted_masks(bits, threshold, levels, count)
    if mask == "voted":
        return voted
    # One row for each level. The seed is the same, so the active weights of a level are also active
    # in the levels below it.
    drawn = [random_mask(trained.vector, row, unseen.seed) for row in voted[::count]]
    return torch.stack(drawn).repeat_interleave(count, 0)


def random_mask(vector: ParameterVector, bits: Tensor, seed: int) -> Tensor:
    """Draw a mask with as many active weights in each layer as `bits`, int32 [P_m / 32]."""
    active = unpack_bits(bits, vector.maskable_size)
    counts = [int(slot.view(active).sum()) for slot in vector.maskable_slots]
    return draw_mask(vector, counts, seed).to(bits.device)


def nearest_tasks(
    setup: Setup, checkpoint: Checkpoint, unseen: Sequence[TaskConditioning]
) -> Tensor:
    """For each unseen task, the training task with the most similar gradient (largest cosine).

    These are the dense gradients of the maskable weights on windows of each task's prompt episodes.
    Training tasks also get the mean task embedding here, as unseen tasks do.

    Args:
        setup: the setup of the run.
        checkpoint: a checkpoint of the run.
        unseen: the conditioning of the U unseen tasks.

    Returns:
        int64 [U], indices of training tasks.
    """
    tasks = (*setup.conditioning, *unseen)
    learner = _sequence_learner(setup, tasks, checkpoint)
    learner.prepare_training([_prompts_as_data(task) for task in tasks])
    learner.model.eval()
    trained = len(setup.conditioning)
    # One chunk of all unseen tasks, and then one chunk for each training task.
    chunks = [[*range(trained, len(tasks))], *([task] for task in range(trained))]
    compute = GradientPass(learner.vector, learner.losses_of_drawn, learner.masks_for)
    gradients = TaskGradients(compute, learner.draw_for(checkpoint.step), chunks)
    with setup.execution.computing():
        own, _ = gradients.of(0)
        cosines = [_cosines(own, gradients.of(chunk)[0][0]) for chunk in range(1, len(chunks))]
    return torch.stack(cosines).argmax(0)


def _cosines(gradients: Tensor, other: Tensor) -> Tensor:
    """The cosines of gradients [U, P] with another gradient [P], [U]."""
    return torch.nn.functional.cosine_similarity(gradients, other[None])


def _prompts_as_data(task: TaskConditioning) -> TaskData:
    """Make the data of a task whose training episodes are its prompts."""
    return TaskData(task.name, task.prompts, task.prompts, task.mean, task.deviation, 0.0, 0.0)


def _sequence_learner(
    setup: Setup, conditioning: Sequence[TaskConditioning], checkpoint: Checkpoint
) -> SequenceLearner[SequenceSettings]:
    """Make a learner without masks for other tasks, with the weights of a checkpoint.

    The embedding of every task is the mean of the training tasks' embeddings.
    """
    other = dataclasses.replace(setup, conditioning=tuple(conditioning))
    learner: SequenceLearner[SequenceSettings] = SequenceLearner(other)
    weights = learner.weights()
    embedding = weights.pop("model.task_embedding.weight", None)
    checkpoint.copy_to(weights)
    if embedding is not None:
        trained = checkpoint.tensors["model.task_embedding.weight"]
        embedding.copy_(trained.mean(0))
    return learner
