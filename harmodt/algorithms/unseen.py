"""Acting on tasks that were not trained on: under which mask, and told the task by what.

A few prompt episodes of the task are all that is taken from its data. Observations are normalised
by the mean of the training tasks' statistics, and a model with a task embedding is told the mean of
theirs.
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

from ..checkpoint import Checkpoint
from ..data.inputs import TaskConditioning
from ..data.store import TaskData
from ..errors import UserError
from ..masks.bank import voted_masks
from ..masks.gradients import GradientPass, TaskGradients
from ..masks.initialisation import draw_mask
from ..masks.vector import ParameterVector
from ..networks.decision_transformer import DecisionTransformer
from ..policies.decision import DecisionPolicy
from .harmodt import RandomMaskSettings, load_masks, mask_settings
from .learner import Setup
from .sequence import SequenceLearner, SequenceSettings, build_model, decision_policy, model_tensors

UnseenMask = Literal["voted", "none", "random", "nearest"]


@dataclass(frozen=True)
class Unseen:
    """Tasks to act on that were not trained on, and how.

    Attributes:
        store: whose prompt episodes show the tasks; nothing else of it is used.
        tasks: by name or set; all of the store's if none is named.
        mask: voted: that of Eq. 13. none: all weights. random: as many weights of each layer as
            the voted mask has, at random. nearest: of the training task whose gradient on its own
            prompts agrees most with the unseen task's; it is not the paper's. By default voted
            where the run has masks, and none where not.
        threshold: of the voted mask, as `vote` takes it; by default the run's.
        seed: of the random mask.
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
        tasks: their data, from a store with the checksum `store`.

    Raises:
        UserError: the run has no sequence model, it has no masks and one is asked for, a task has
            no prompt episodes of use, the threshold leaves no weight, or the checkpoint is of
            another model size.
    """
    if not isinstance(setup.config.own, SequenceSettings):
        raise UserError(
            f"{setup.config.algorithm} cannot meet unseen tasks, as sequence models can: leave "
            "--unseen out"
        )
    masked = isinstance(setup.config.own, RandomMaskSettings)
    mask = unseen.mask or ("voted" if masked else "none")
    if mask != "none" and not masked:
        raise UserError(f"{setup.config.algorithm} has no masks: evaluate it with --mask none")
    conditioning = tuple(
        TaskConditioning.of_unseen(task, setup.conditioning, setup.config) for task in tasks
    )
    setup_unseen = dataclasses.replace(setup, conditioning=conditioning)
    model = build_model(setup_unseen)
    _load_weights(model, checkpoint)
    levels = setup.config.own.mask_levels
    bits = None
    if mask == "nearest":
        nearest = nearest_tasks(setup, checkpoint, conditioning)
        trained = load_masks(setup, model.vector, checkpoint)
        bits = torch.cat([of_level[nearest] for of_level in trained.chunk(levels)])
    elif mask != "none":
        trained = load_masks(setup, model.vector, checkpoint)
        default = mask_settings(setup).unseen_threshold
        threshold = default if unseen.threshold is None else unseen.threshold
        bits = voted_masks(trained, threshold, levels, len(conditioning))
        if mask == "random":
            drawn = [random_mask(model.vector, row, unseen.seed) for row in bits[:: len(tasks)]]
            bits = torch.stack(drawn).repeat_interleave(len(tasks), 0)
    policy = decision_policy(setup_unseen, model, bits, checkpoint.step)
    own_threshold = unseen.threshold is not None and mask in ("voted", "random")
    policy.mask = f"{mask}>{unseen.threshold:g}" if own_threshold else mask
    policy.unseen = store
    return policy


def random_mask(vector: ParameterVector, bits: Tensor, seed: int) -> Tensor:
    """A mask, int32 [P_m / 32], with as many weights of each layer as another has, at random."""
    active = unpack_bits(bits, vector.maskable_size)
    counts = [int(slot.view(active).sum()) for slot in vector.maskable_slots]
    return draw_mask(vector, counts, seed).to(bits.device)


def nearest_tasks(
    setup: Setup, checkpoint: Checkpoint, unseen: Sequence[TaskConditioning]
) -> Tensor:
    """For each unseen task, the training task whose gradient has the largest cosine with its own.

    Gradients are those of the dense model over the maskable weights, on windows of the prompt
    episodes of either task. A task embedding is the same for all of them, as for unseen tasks.

    Args:
        setup: the run's.
        unseen: U tasks.

    Returns:
        int64 [U], indices of training tasks.
    """
    tasks = (*setup.conditioning, *unseen)
    learner = SequenceLearner(
        dataclasses.replace(setup, conditioning=tasks), [_prompts_as_data(task) for task in tasks]
    )
    _load_weights(learner.model, checkpoint)
    learner.model.eval()
    trained = len(setup.conditioning)
    parts = [[*range(trained, len(tasks))], *([task] for task in range(trained))]
    compute = GradientPass(learner.vector, learner.losses_of, learner.masks_of)
    gradients = TaskGradients(compute, learner.draw_of(checkpoint.step), parts)
    with setup.execution.computing():
        own, _ = gradients.of(0)
        cosines = [_cosines(own, gradients.of(part)[0][0]) for part in range(1, len(parts))]
    return torch.stack(cosines).argmax(0)


def _cosines(gradients: Tensor, other: Tensor) -> Tensor:
    """Of each of some gradients [U, P] with another one [P], [U]."""
    return torch.nn.functional.cosine_similarity(gradients, other[None])


def _prompts_as_data(task: TaskConditioning) -> TaskData:
    """A task whose training episodes are its prompts."""
    return TaskData(task.name, task.prompts, task.prompts, task.mean, task.deviation, 0.0, 0.0)


def _load_weights(model: DecisionTransformer, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights; every task's embedding is the mean of the training tasks'."""
    parameters = model_tensors(model)
    embedding = parameters.pop("model.task_embedding.weight", None)
    checkpoint.copy_to(parameters)
    if embedding is not None:
        trained = checkpoint.tensors["model.task_embedding.weight"]
        embedding.copy_(trained.mean(0))
