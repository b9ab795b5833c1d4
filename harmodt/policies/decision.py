"""A trained model as a policy over many episodes at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from harmodt_kernels import PYTORCH, Backend

from ..batch import Steps
from ..config import TrainConfig
from ..data.inputs import TaskConditioning, load_conditioning
from ..data.windows import WindowArrays, WindowSampler
from ..devices import check_device, choose_backend, set_precision
from ..environments import METAWORLD, family
from ..errors import UserError
from ..masks.bank import TaskMasks, vote
from ..networks.decision_transformer import DecisionTransformer, PromptCache
from ..training.checkpoint import load_checkpoint, load_parameters, read_run

_HISTORY = ("returns_to_go", "observations", "actions", "timesteps", "valid")


class Policy:
    """Acts in N episodes in lock-step, one model call per time step.

    An episode's history starts empty; its return-to-go starts at the task's target and falls by
    each reward. The prompt is encoded once per episode.

    Args:
        model: the model, on its device; it is put into evaluation mode.
        mask_bits: int32 [T, P_m / 32], the tasks' masks, or None for a model without masks.
        conditioning: one entry per task; index = task id.
        config: the run's settings.
        step: training steps of the checkpoint that was loaded.
        backend: the kernels that apply the masks.

    Attributes:
        tasks: task names; index = task id.
        mask: "task" if each task has its own mask, "voted" for that of Eq. 13, "none" without.
        target_returns: float64 [T], the return asked for in each task.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        mask_bits: torch.Tensor | None,
        conditioning: Sequence[TaskConditioning],
        config: TrainConfig,
        step: int = 0,
        backend: Backend = PYTORCH,
        precision: str = "fp32",
    ):
        self.model = model.eval()
        self.mask_bits = mask_bits
        self.mask = "none" if mask_bits is None else "task"
        self.conditioning = list(conditioning)
        self.config = config
        self.step = step
        self._backend = backend
        self._device = model.vector.weights.device
        self.environment = family(METAWORLD).spec
        self.backend = backend.name
        self.precision = precision
        self.device = str(self._device)
        self.tasks = tuple(task.name for task in conditioning)
        self.target_returns = np.array([task.target_return for task in conditioning])
        self._sampler = WindowSampler((), conditioning, config, self._device)

    @classmethod
    def load(
        cls,
        run: Path,
        checkpoint: int | None = None,
        device: str = "cpu",
        fused: bool = False,
        precision: str = "fp32",
    ) -> Policy:
        """Load a run's checkpoint, the last one by default.

        Raises:
            UserError: no such run, checkpoint or device, a checkpoint of another model size, or no
                fused kernels for the device although they are asked for.
        """
        torch_device = check_device(device)
        backend = choose_backend(fused, torch_device)
        description = read_run(run)
        config = TrainConfig.from_json(description["config"])
        state = load_checkpoint(run, checkpoint)
        conditioning = load_conditioning(run / "conditioning.safetensors", description["tasks"])
        model = DecisionTransformer(config.model(), len(conditioning), torch_device)
        load_parameters(state, dict(model.named_parameters()))
        mask_bits = state.tensors["masks"].to(torch_device) if config.masked else None
        set_precision(precision, torch_device, backend)
        step = state.values["step"]
        return cls(model, mask_bits, conditioning, config, step, backend, precision)

    def use_voted_mask(self) -> None:
        """Put the mask for unseen tasks (Eq. 13) in the place of every task's own.

        Raises:
            UserError: the run has no masks.
        """
        if self.mask_bits is None:
            raise UserError(
                f"a run of {self.config.algorithm} has no masks to vote: use its weights"
            )
        voted = vote(self.mask_bits, self.config.unseen_threshold)
        self.mask_bits = voted.expand_as(self.mask_bits)
        self.mask = "voted"

    def start(
        self, task_ids: np.ndarray, seed: int = 0, target_returns: np.ndarray | None = None
    ) -> None:
        """Begin N new episodes.

        Args:
            task_ids: int [N], the task of each row.
            seed: seed of the prompts.
            target_returns: float [N]; by default each task's.
        """
        self._task_ids = np.asarray(task_ids)
        self._rng = np.random.default_rng(seed)
        self._targets = (
            self.target_returns[self._task_ids] if target_returns is None else target_returns
        ).astype(np.float64)
        rows, length, config = len(self._task_ids), self.config.context_length, self.config.model()
        self._returns_to_go = self._targets.copy()
        self._time = np.zeros(rows, np.int64)
        self._history = WindowArrays(
            returns_to_go=np.zeros((rows, length), np.float32),
            observations=np.zeros((rows, length, config.observation_size), np.float32),
            actions=np.zeros((rows, length, config.action_size), np.float32),
            timesteps=np.zeros((rows, length), np.int64),
            valid=np.zeros((rows, length), bool),
        )
        self._arrange()
        self._prompts: list[WindowArrays | None] = [None] * rows
        self.restart(np.ones(rows, bool))

    def restart(self, rows: np.ndarray) -> None:
        """Begin new episodes in the rows where `rows`, bool [N], is True."""
        self._returns_to_go[rows] = self._targets[rows]
        self._time[rows] = 0
        self._history.valid[rows] = False
        if self.config.model().prompt_length and rows.any():
            for row in np.flatnonzero(rows):
                self._prompts[row] = self._sampler.prompt_windows(
                    int(self._task_ids[row]), self._rng, 1
                )
            self._encode_prompts()

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Choose actions, float32 [N, 4] in [-1, 1], after observations float [N, 39]."""
        self._append(observations)
        with torch.inference_mode():
            actions = self.model.act(
                self._grouped(self._history), self._group_ids, self._masks,
                self._prompt_cache, self._prompt_valid,
            )  # fmt: skip
        chosen = actions.float().cpu().numpy()[self._group, self._place]
        hidden = self._rng.random(len(chosen)) < self.config.action_dropout
        self._history.actions[:, -1] = np.where(hidden[:, None], 0.0, chosen)
        return chosen

    def record_rewards(self, rewards: np.ndarray) -> None:
        """Lower each row's return-to-go by the reward of its last action, float [N]."""
        self._returns_to_go -= rewards

    def _append(self, observations: np.ndarray) -> None:
        """Shift every history by one step and write the present one at its end."""
        for name in _HISTORY:
            array = getattr(self._history, name)
            array[:, :-1] = array[:, 1:]
        self._history.returns_to_go[:, -1] = self._returns_to_go / self.config.return_scale
        for task in np.unique(self._task_ids):
            rows = self._task_ids == task
            self._history.observations[rows, -1] = self.conditioning[task].normalise(
                observations[rows]
            )
        self._history.timesteps[:, -1] = np.minimum(self._time, self.config.max_timesteps - 1)
        self._history.valid[:, -1] = True
        self._time += 1

    def _arrange(self) -> None:
        """Lay the rows out as one group per task; short groups repeat their rows."""
        present = np.unique(self._task_ids)
        members = [np.flatnonzero(self._task_ids == task) for task in present]
        width = max(map(len, members))
        self._rows = np.stack([np.resize(m, width) for m in members])  # [G, B]
        self._group = np.searchsorted(present, self._task_ids)
        self._place = np.zeros(len(self._task_ids), np.int64)
        for rows in members:
            self._place[rows] = np.arange(len(rows))
        self._group_ids = torch.from_numpy(present).to(self._device)
        self._masks = (
            TaskMasks(self.mask_bits, self._group_ids, self._backend)
            if self.mask_bits is not None
            else None
        )
        self._prompt_cache: PromptCache | None = None
        self._prompt_valid: torch.Tensor | None = None

    def _grouped(self, windows: WindowArrays) -> Steps:
        return Steps(
            **{
                name: torch.from_numpy(getattr(windows, name)[self._rows]).to(self._device)
                for name in _HISTORY
            }
        )

    def _encode_prompts(self) -> None:
        joined = WindowArrays(
            **{n: np.concatenate([getattr(p, n) for p in self._prompts]) for n in _HISTORY}
        )
        steps = self._grouped(joined)
        with torch.inference_mode():
            self._prompt_cache = self.model.encode_prompt(steps, self._group_ids, self._masks)
        self._prompt_valid = steps.valid
