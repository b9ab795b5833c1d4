"""MTDiff: its diffusion and its network against others written here; training; planning."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import assert_same, final
from tiny import SPEC, TASKS, configure, make_episode, make_setup, make_store, make_trainer
from torch import Tensor

from harmodt import load_policy, train
from harmodt.algorithms import find, preset
from harmodt.algorithms.mtdiff import MTDiffLearner
from harmodt.algorithms.optimiser import learning_rate
from harmodt.algorithms.unseen import Unseen, unseen_policy
from harmodt.checkpoint import Checkpoint
from harmodt.data.store import DataStore
from harmodt.data.windows import Drawn
from harmodt.data.writer import StoreWriter
from harmodt.draws import TRAIN, Draws
from harmodt.errors import UserError
from harmodt.networks.denoiser import Denoiser, DenoiserConfig, Situation
from harmodt.networks.diffusion import Diffusion
from harmodt.policies.plan import PlanPolicy
from harmodt.rundir import RunDirectory
from harmodt.settings import change, check
from harmodt.training import trainer as trainer_module
from harmodt.training.trainer import Trainer

ALGORITHMS = ["mtdiff-p", "mtdiff-p-onehot"]
SMALL = {
    "context_length": 3, "horizon": 5, "diffusion_steps": 16, "sampling_steps": 4,
    "deviation_floor": 0.5,  # else any change of what is constant in the data would be enormous
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def trainer_of(store: DataStore, algorithm: str = "mtdiff-p", **changes: object) -> Trainer:
    return make_trainer(store, configure(algorithm, **{**SMALL, **changes}))


@pytest.fixture(scope="module")
def learners(store: DataStore) -> dict[str, MTDiffLearner]:
    """Trained a little, by algorithm: plans are not all clipped, and everything matters."""
    found = {}
    for algorithm in ALGORITHMS:
        trainer = trainer_of(store, algorithm, learning_rate=5e-3, layers=1, horizon=3)
        for _ in range(60):
            trainer.train_step()
        found[algorithm] = trainer.learner
    return found


def policy_of(learner: MTDiffLearner, **changes: object) -> PlanPolicy:
    policy = learner.policy(60)
    policy.settings = dataclasses.replace(policy.settings, **changes)
    return policy


# The diffusion


def shares(steps: int) -> np.ndarray:
    """ᾱ after each of T steps, from the β of every step as the process is discretised."""
    t = np.arange(1, steps + 1)
    alphas = np.exp(-0.1 / steps - 0.5 * (10 - 0.1) * (2 * t - 1) / steps**2)
    return np.cumprod(alphas)


@pytest.mark.parametrize("steps", [1, 7, 200])
def test_noise_is_added_as_the_schedule_says(steps: int) -> None:
    rng = np.random.default_rng(0)
    clean, noise = rng.uniform(-1, 1, (2, steps, 3, 4)), rng.normal(size=(2, steps, 3, 4))
    times = np.stack([np.arange(steps), rng.permutation(steps)])
    kept = shares(steps)[times][..., None, None]
    expected = np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise
    parts = (torch.from_numpy(part) for part in (clean, times, noise))
    noisy = Diffusion(steps).noised(*parts)
    np.testing.assert_allclose(noisy.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("steps", "count"), [(200, 200), (200, 10), (200, 7), (5, 1), (1, 1)])
def test_a_sampler_begins_at_the_last_time_and_goes_in_even_strides(steps: int, count: int) -> None:
    times = [*Diffusion(steps).times(count), -1]
    strides = -np.diff(times)
    assert len(times) == count + 1
    assert times[0] == steps - 1
    assert strides.min() >= 1
    assert strides.max() - strides.min() <= 1
    assert Diffusion(200).times(10)[:2] == [199, 179]


MEAN, DEVIATION = 0.2, 0.1
"""Of a Gaussian whose clean numbers are far from where they are clipped."""


def gaussian_noise(x: Tensor, time: int, kept: np.ndarray) -> Tensor:
    """The noise that is expected in x, of clean numbers from that Gaussian."""
    signal, scale = math.sqrt(kept[time]), math.sqrt(1 - kept[time])
    total = kept[time] * DEVIATION**2 + 1 - kept[time]
    return scale * (x - signal * MEAN) / total


def moments(steps: int, temperature: float) -> tuple[float, float]:
    """Mean and variance that DDPM ends in, from each step's posterior (Ho et al., Eq. 7)."""
    kept, mean, variance = shares(steps), 0.0, 1.0
    for t in range(steps - 1, -1, -1):
        before = kept[t - 1] if t else 1.0
        alpha, beta = kept[t] / before, 1 - kept[t] / before
        gain = math.sqrt(kept[t]) * DEVIATION**2 / (kept[t] * DEVIATION**2 + 1 - kept[t])
        of_clean = math.sqrt(before) * beta / (1 - kept[t])
        slope = of_clean * gain + math.sqrt(alpha) * (1 - before) / (1 - kept[t])
        mean = slope * mean + of_clean * (1 - gain * math.sqrt(kept[t])) * MEAN
        posterior = (1 - before) / (1 - kept[t]) * beta
        variance = slope**2 * variance + temperature**2 * posterior
    return mean, variance


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ddpm_gives_the_mean_and_deviation_of_a_gaussian(temperature: float) -> None:
    steps, count = 50, 40_000
    kept, diffusion = shares(steps), Diffusion(steps)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    x = diffusion.denoised(
        lambda x, time: gaussian_noise(x, time, kept),
        draw(),
        diffusion.times(steps),
        lambda: temperature * draw(),
    )
    assert x.dtype == torch.float64
    mean, variance = moments(steps, temperature)
    error = math.sqrt(variance / count)  # five standard errors of a mean and of a deviation
    assert x.mean().item() == pytest.approx(mean, abs=5 * error)
    assert x.std().item() == pytest.approx(math.sqrt(variance), abs=5 * error / math.sqrt(2))


def test_the_moments_of_ddpm_are_the_gaussians_the_more_steps_there_are() -> None:
    """A step's posterior is that of a known clean number, whose own deviation it leaves out."""
    found = [moments(steps, 1.0) for steps in (50, 200, 800, 3200)]
    means = [abs(mean - MEAN) for mean, _ in found]
    gaps = [DEVIATION - math.sqrt(variance) for _, variance in found]
    assert max(means) < 0.01
    assert all(0 < more < 0.5 * fewer for more, fewer in zip(gaps[1:], gaps, strict=False))
    assert gaps[-1] < 0.02 * DEVIATION
    cold = [math.sqrt(moments(steps, 0.5)[1]) for steps in (50, 200, 800)]
    assert max(cold) < 0.7 * DEVIATION


def test_ddim_moves_noise_to_where_the_gaussians_flow_does() -> None:
    """The flow keeps how many deviations a number is from the mean; the error falls as 1 / S."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    errors = []
    for steps in (25, 50, 100):
        diffusion, kept = Diffusion(200), shares(200)
        found = diffusion.denoised(
            lambda x, time, kept=kept: gaussian_noise(x, time, kept), x, diffusion.times(steps)
        )
        signal = math.sqrt(kept[-1])
        total = math.sqrt(kept[-1] * DEVIATION**2 + 1 - kept[-1])
        expected = MEAN + DEVIATION * (x - signal * MEAN) / total
        errors.append(float((found - expected).abs().max()))
    assert errors[0] < 0.6 * 3 * DEVIATION
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert 0.3 * fewer < more < 0.7 * fewer


def test_what_is_predicted_of_a_clean_plan_is_clipped() -> None:
    diffusion = Diffusion(8)
    x = torch.full((3,), 2.0)
    for draw in (None, lambda: torch.ones(3)):
        seen: list[float] = []

        def far(x: Tensor, time: int, seen: list[float] = seen) -> Tensor:
            seen.append(float(x[0]))
            return -5 * torch.ones_like(x)  # the clean plan would be above 1

        assert diffusion.denoised(far, x, diffusion.times(8), draw).tolist() == [1.0] * 3
        assert max(seen) < 4


# The network


def config(**changes: int) -> DenoiserConfig:
    sizes = {
        "observation_size": 6, "action_size": 3, "task_size": 5, "task_length": 4,
        "context_length": 2, "horizon": 7, "embed_dim": 16, "layers": 2, "heads": 4,
    }  # fmt: skip
    return DenoiserConfig(**{**sizes, **changes})


def inputs(config: DenoiserConfig, rows: int = 3, length: int | None = None) -> tuple:
    """Plans, times and situations of random numbers."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    situation = Situation(
        normal(rows),
        normal(rows, config.task_length, config.task_size),
        normal(rows, config.context_length, config.observation_size),
    )
    plans = normal(rows, length or config.horizon, config.action_size)
    return plans, torch.tensor([0, 7, 150])[:rows], situation, torch.ones(rows, dtype=torch.bool)


def made(config: DenoiserConfig) -> Denoiser:
    """A model whose every parameter is drawn, so that none is left out unseen."""
    torch.manual_seed(0)
    model = Denoiser(config).eval()
    model.vector.weights.copy_(torch.randn_like(model.vector.weights) * 0.3)
    return model


def predicted(
    parameters: dict[str, Tensor],
    config: DenoiserConfig,
    plans: Tensor,
    times: Tensor,
    situation: Situation,
    told: Tensor,
) -> Tensor:
    """The noise by the definition, in float64: token by token, head by head."""
    p = {name: value.double() for name, value in parameters.items()}
    d = config.embed_dim

    def linear(name: str, x: Tensor, weight: str = "weight", bias: str = "bias") -> Tensor:
        return x @ p[f"{name}.{weight}" if name else weight].T + p[f"{name}.{bias}"]

    def mish(x: Tensor) -> Tensor:
        return x * torch.tanh(torch.log1p(torch.exp(x)))

    def mlp(name: str, x: Tensor) -> Tensor:
        last = max(int(key.split(".")[1]) for key in p if key.startswith(f"{name}."))
        x = linear(f"{name}.0", x)
        for index in range(2, last + 1, 2):
            x = linear(f"{name}.{index}", mish(x))
        return x

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    rows = []
    for row in range(len(plans)):
        half = d // 2
        angles = [float(times[row]) / 10_000 ** (i / (half - 1)) for i in range(half)]
        waves = [*map(math.sin, angles), *map(math.cos, angles)]
        time = mlp("time_embedding", torch.tensor(waves, dtype=torch.float64))
        value = mlp("return_embedding", situation.returns_to_go[row, None].double())
        value = value if told[row] else torch.zeros(d, dtype=torch.float64)
        tokens = [time, value]
        tokens += [mlp("task_embedding", x.double()) for x in situation.task[row]]
        tokens += [mlp("observation_embedding", x.double()) for x in situation.observations[row]]
        tokens += [linear("action_embedding", x.double()) for x in plans[row]]
        x = torch.stack([time * t + value + p["positions"][i] for i, t in enumerate(tokens)])
        x = norm("embedding_norm", x)
        for layer in range(config.layers):
            name = f"blocks.layers.{layer}"
            qkv = linear(
                f"{name}.self_attn", norm(f"{name}.norm1", x), "in_proj_weight", "in_proj_bias"
            )
            queries, keys, values = qkv.split(d, dim=1)
            attended, width = torch.zeros_like(x), d // config.heads
            for head in range(config.heads):
                of_head = slice(head * width, (head + 1) * width)
                for i in range(len(x)):
                    scores = keys[: i + 1, of_head] @ queries[i, of_head] / math.sqrt(width)
                    attended[i, of_head] = scores.softmax(0) @ values[: i + 1, of_head]
            x = x + linear(f"{name}.self_attn.out_proj", attended)
            hidden = mish(linear(f"{name}.linear1", norm(f"{name}.norm2", x)))
            x = x + linear(f"{name}.linear2", hidden)
        x = norm("blocks.norm", x)[-len(plans[row]) :]
        rows.append(linear("noise_head", x))
    return torch.stack(rows)


@pytest.mark.parametrize("changes", [{}, {"heads": 1, "layers": 1}, {"task_length": 1}])
def test_the_network_is_its_definition(changes: dict[str, int]) -> None:
    made_of = config(**changes)
    model = made(made_of)
    plans, times, situation, told = inputs(made_of)
    told[1] = False
    with torch.no_grad():
        found = model(plans, times, situation, told)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = predicted(parameters, made_of, plans, times, situation, told)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_prediction_reads_all_that_it_is_told_and_no_later_action() -> None:
    made_of = config()
    model = made(made_of)
    plans, times, situation, told = inputs(made_of)

    def moved(
        plans: Tensor = plans, times: Tensor = times, situation: Situation = situation
    ) -> Tensor:
        """Of which actions, [N, H], another prediction is made."""
        with torch.no_grad():
            before, after = model(*inputs(made_of)), model(plans, times, situation, told)
        return ((before - after).abs() > 1e-4).any(-1)

    assert not moved().any()
    assert moved(times=times + 1).all()
    for name in Situation._fields:
        other = situation._replace(**{name: getattr(situation, name) + 0.5})
        assert moved(situation=other).all(), name
    for position in range(made_of.horizon):
        other = plans.clone()
        other[:, position] += 1
        assert not moved(plans=other)[:, :position].any()
        assert moved(plans=other)[:, position:].all()
    told = ~told
    one = model(plans, times, situation, told)
    two = model(plans, times, situation._replace(returns_to_go=-situation.returns_to_go), told)
    assert torch.equal(one, two)


def test_a_prediction_makes_no_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of = config()
    model = made(made_of)
    expected = model(*inputs(made_of))

    def make(*_: object) -> Tensor:
        raise AssertionError("a mask is made for each prediction")

    monkeypatch.setattr(torch.nn.Transformer, "generate_square_subsequent_mask", make)
    assert torch.equal(model(*inputs(made_of)), expected)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_the_first_actions_of_a_plan_can_be_drawn_alone() -> None:
    made_of = config()
    model, diffusion = made(made_of), Diffusion(20)
    _, _, situation, told = inputs(made_of)
    embedded = model.embed(situation, told)
    noise = torch.randn(21, 3, made_of.horizon, made_of.action_size)

    def drawn(length: int) -> Tensor:
        parts = iter(noise[:, :, :length])

        def predict(x: Tensor, time: int) -> Tensor:
            return model.predict(x, torch.full((3,), time), embedded)

        with torch.no_grad():
            return diffusion.denoised(
                predict, next(parts), diffusion.times(20), lambda: next(parts)
            )

    whole = drawn(made_of.horizon)
    assert whole.abs().max() <= 1
    for length in (1, 3):
        torch.testing.assert_close(drawn(length), whole[:, :length], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_has_the_papers_number_of_parameters(store: DataStore, algorithm: str) -> None:
    """Of Table 1 in the HarmoDT paper, on MT50."""
    own = preset("quickstart", algorithm)
    setup = make_setup(store, change(configure(algorithm), {"device": "cpu"}))
    fifty = (setup.conditioning * 17)[:50]
    model = MTDiffLearner(dataclasses.replace(setup, config=own, conditioning=fifty)).model
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(5.32e6, rel=0.02)


# Training


def test_windows_begin_at_the_present_and_the_first_step_is_repeated_before(
    store: DataStore,
) -> None:
    learner = trainer_of(store, batch_per_task=64).learner
    draws = Draws(0, TRAIN, 0)
    drawn = learner.sampler.draw(torch.tensor([1]), draws)
    batch, actions = learner.sampler.sample([1], draws)
    data, conditioning = store.task(TASKS[1]).train, learner.setup.conditioning[1]
    first = sum(len(store.task(name).train) for name in TASKS[:1])
    seen = set()
    for window in range(64):
        episode = int(drawn.episodes[0, window]) - first
        begins, ends = data.episode_starts[episode], data.episode_starts[episode + 1]
        start = int(drawn.times[0, window, 2])  # of three observations the last is the present
        seen.add(min(start, 2))
        for place, time in enumerate(range(start - 2, start + 5)):
            at = min(begins + max(time, 0), ends - 1)
            valid = begins + time < ends
            assert batch.history.valid[0, window, place] == valid
            observation = (data.observations[at] - conditioning.mean) / conditioning.deviation
            np.testing.assert_allclose(
                batch.history.observations[0, window, place], observation, rtol=1e-5, atol=1e-5
            )
            expected = np.clip(data.actions[at], -1, 1)
            np.testing.assert_array_equal(actions[0, window, place], expected)
        present = batch.history.returns_to_go[0, window, 2]
        assert present == pytest.approx(data.returns_to_go[begins + start] / 1000, rel=1e-5)
    assert seen == {0, 1, 2}
    assert not batch.history.valid.all()


def test_times_and_noise_are_of_their_distributions_and_of_their_step_alone(
    store: DataStore,
) -> None:
    learner = trainer_of(store, batch_per_task=16, horizon=3).learner
    _, times, told, noise = learner.extra_inputs(range(1, 201))
    assert noise.shape == (200, 2, 16, 3, 4)
    count = times.numel()
    counts = torch.bincount(times.flatten(), minlength=16)
    share = count / 16
    assert float(((counts - share) ** 2 / share).sum()) < 45  # chi-square of 15, one in 10,000
    assert told.double().mean().item() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / count))
    values = noise.double().flatten().sort().values
    normal = torch.distributions.Normal(0.0, 1.0).cdf(values)
    ranks = (torch.arange(len(values)) + 0.5) / len(values)
    # the largest distance of two distribution functions, beyond which one in 10,000 lies
    assert float((normal - ranks).abs().max()) < 2.23 / math.sqrt(len(values))
    flat = noise.flatten(2)  # [200, 2, 192]
    correlations = torch.corrcoef(flat.reshape(400, 192).T).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(400)
    for whole, part in zip(
        learner.extra_inputs(range(1, 201)), learner.extra_inputs(range(150, 152)), strict=True
    ):
        assert torch.equal(whole[149:151], part)
    assert len(noise.unique()) > 0.99 * noise.numel()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_is_that_of_the_definition(store: DataStore, algorithm: str) -> None:
    """Loss, gradient and one update, in float64."""
    trainer = trainer_of(
        store, algorithm, horizon=9, tasks_per_step=3, adam_epsilon=0.01, gradient_clip=0.1,
        weight_decay=0.1, first_action_weight=4.0, return_dropout=0.5, layers=1,
    )  # fmt: skip
    learner = trainer.learner
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    task_ids = learner.feed.load(1)
    batch, actions = learner.feed.batch()
    _, times, told, noise = (part.clone() for part in learner.feed.extra)
    assert told.any() and not told.all()
    assert not batch.history.valid.all()

    parameters = {name: p.double().requires_grad_() for name, p in before.items()}
    kept, losses = torch.from_numpy(shares(16)), []
    for group, task in enumerate(task_ids):
        total = weights = torch.zeros((), dtype=torch.float64)
        for window in range(4):
            at, here = (group, window), batch.history
            alpha = kept[times[at]]
            plan = alpha.sqrt() * actions[at][2:] + (1 - alpha).sqrt() * noise[at]
            if batch.prompt is None:
                tokens = torch.eye(3)[task][None]
            else:
                steps = zip(batch.prompt.observations[at], batch.prompt.actions[at], strict=True)
                tokens = torch.stack([torch.cat(step) for step in steps])
            situation = Situation(
                here.returns_to_go[at][2][None], tokens[None], here.observations[at][:3][None]
            )
            found = predicted(
                parameters, learner.model.config, plan[None], times[at][None], situation,
                told[at][None],
            )[0]  # fmt: skip
            for place in range(9):
                if not here.valid[at][2 + place]:
                    continue
                weight = 4.0 if place == 0 else 1.0
                error = found[place] - noise[at][place]
                huber = torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5)
                total, weights = total + weight * huber.mean(), weights + weight
        losses.append(total / weights)
    (sum(losses) / 3).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
    assert norm > 0.1  # it is clipped

    result = trainer.train_step()
    torch.testing.assert_close(
        result.losses.double(), torch.stack(losses).detach(), rtol=1e-5, atol=1e-6
    )
    assert result.gradient_norm.item() == pytest.approx(norm, rel=1e-4)
    rate = learning_rate(1, trainer.setup.config.optimisation)
    for name, found in learner.model.named_parameters():
        gradient = parameters[name].grad * 0.1 / norm
        # AdamW's first step: both running means are the gradient's and its square
        moved = before[name].double() * (1 - rate * 0.1)
        moved = moved - rate * gradient / (gradient.abs() + 0.01)
        torch.testing.assert_close(
            found.detach().double(), moved, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_policy_acts_with_a_running_mean_of_the_weights(store: DataStore) -> None:
    trainer = trainer_of(store, average_decay=0.9, learning_rate=0.01)
    mean = trainer.learner.model.vector.weights.double()
    assert torch.equal(trainer.learner.policy(0).model.vector.weights.double(), mean)
    for step in range(1, 16):
        trainer.train_step()
        share = max(0.1, 1 / step)
        mean = (1 - share) * mean + share * trainer.learner.model.vector.weights.double()
    found = trainer.learner.policy(15).model.vector.weights
    torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-6)
    assert (found - trainer.learner.model.vector.weights).abs().max() > 0.01


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_lowers_the_loss(store: DataStore, algorithm: str) -> None:
    trainer = trainer_of(store, algorithm, tasks_per_step=3, learning_rate=3e-3)
    losses = torch.stack([trainer.train_step().losses for _ in range(60)]).mean(1)
    assert losses[-10:].mean() < 0.7 * losses[:10].mean()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_goes_on_after_a_kill_as_if_there_had_been_none(
    store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    monkeypatch.setattr(trainer_module, "play", runs.play)
    more = ("--horizon", "4", "--diffusion-steps", "8", "--sampling-steps", "4")
    for name in ("whole", "cut"):
        flags = (*more, "--evaluation-episodes", "1")
        runs.begin(store, tmp_path / name, *flags, algorithm=algorithm)
    for step in (8, 12):
        directory = RunDirectory(tmp_path / "cut").checkpoint(step)
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    train.main(["--resume", str(tmp_path / "cut")])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    tensors = final(tmp_path / "whole")
    policy = load_policy(tmp_path / "whole")
    assert policy.step == 12
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, tensors[f"average.{name}"])


# Planning


def acted(policy: PlanPolicy, tasks: list[int], steps: int = 1, seed: int = 0, **more) -> Tensor:
    """Actions [steps, N, A] on observations that change from step to step."""
    policy.start(np.array(tasks), seed, **more)
    rng = np.random.default_rng(5)
    actions = []
    for _ in range(steps):
        actions.append(policy.act(rng.normal(size=(len(tasks), SPEC.observation_size))))
        policy.record_rewards(np.ones(len(tasks)))
    return torch.from_numpy(np.stack(actions))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plans_are_drawn_from_the_seed(
    learners: dict[str, MTDiffLearner], algorithm: str, sampler: str
) -> None:
    policy = policy_of(learners[algorithm], sampler=sampler)
    actions = acted(policy, [0, 2, 1, 2], steps=3)
    assert actions.shape == (3, 4, 4)
    assert actions.dtype == torch.float32
    assert actions.abs().max() <= 1
    torch.manual_seed(999)  # nothing outside counts
    assert torch.equal(acted(policy, [0, 2, 1, 2], steps=3), actions)
    assert not torch.equal(acted(policy, [0, 2, 1, 2], steps=3, seed=1), actions)


def test_what_is_planned_for_is_what_training_saw(tmp_path: Path) -> None:
    """Along a stored episode, asked for its own return, with one prompt that there can be."""
    store = make_store(tmp_path / "store", prompt_lengths=(3,))
    learner = trainer_of(store, prompt_length=3).learner
    policy, data = learner.policy(0), store.task(TASKS[1]).train
    seen: list[Situation] = []

    def draw(situation: Situation, rows: np.ndarray) -> Tensor:
        seen.append(situation)
        return torch.zeros(2, 1, 4)

    policy._draw = draw
    policy.start(np.array([1, 1]), target_returns=data.returns[[0, 0]])
    length = int(data.lengths[0])
    for time in range(length):
        policy.act(data.observations[[time, time]])
        policy.record_rewards(data.rewards[[time, time]])
    policy.restart(np.array([False, True]))
    policy.act(data.observations[[0, 0]])

    first = len(store.task(TASKS[0]).train)
    times = (torch.arange(length)[:, None] + torch.arange(-2, 5)).clamp(0, length - 1)[None]
    there = torch.ones_like(times, dtype=torch.bool)
    prompts = torch.tensor([1] * length)[None], torch.arange(3).expand(1, length, 3)
    episodes = torch.full((1, length), first)
    batch, _ = learner.sampler.gather(
        torch.tensor([1]), Drawn(episodes, times, there, there, *prompts)
    )
    expected = learner._situation(batch)
    for name, found in zip(Situation._fields, zip(*seen, strict=True), strict=True):
        whole = getattr(expected, name)
        for row in range(2):
            rows = torch.stack([part[row] for part in found[:length]])
            torch.testing.assert_close(rows, whole, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(found[length][1], whole[0], rtol=1e-4, atol=1e-5, msg=name)
    # the other row is where it was
    torch.testing.assert_close(seen[length].observations[0, :2], seen[-2].observations[0, 1:])


def test_a_plan_is_acted_on_before_the_next(learners: dict[str, MTDiffLearner]) -> None:
    policy = policy_of(learners["mtdiff-p"], replan_every=3)
    drawn: list[int] = []
    original = policy._draw

    def draw(situation: Situation, rows: np.ndarray) -> Tensor:
        drawn.append(len(situation.task))
        plans = original(situation, rows)
        assert plans.shape == (len(situation.task), 3, 4)
        return plans

    policy._draw = draw
    policy.start(np.array([0, 1]))
    observations = np.zeros((2, SPEC.observation_size))
    for step in range(8):
        policy.act(observations)
        policy.record_rewards(np.zeros(2))
        if step == 3:
            policy.restart(np.array([False, True]))
    assert drawn == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guidance_weighs_the_return(learners: dict[str, MTDiffLearner], sampler: str) -> None:
    def actions(guidance: float, target: float) -> Tensor:
        policy = policy_of(learners["mtdiff-p"], sampler=sampler, guidance=guidance)
        return acted(policy, [0, 1], target_returns=np.array([target, target]))

    assert torch.equal(actions(0.0, 10.0), actions(0.0, 5000.0))
    moved = [(actions(w, 10.0) - actions(w, 5000.0)).abs().max() for w in (0.3, 1.0, 1.2)]
    assert all(each > 1e-3 for each in moved)
    different = [actions(w, 5000.0) for w in (0.0, 0.3, 1.0, 1.2)]
    for one in range(4):
        for two in range(one):
            assert not torch.allclose(different[one], different[two], atol=1e-4)


def test_temperature_is_of_each_steps_noise_or_of_the_first(
    learners: dict[str, MTDiffLearner],
) -> None:
    def actions(sampler: str, temperature: float, seed: int) -> Tensor:
        changes = {"sampler": sampler, "temperature": temperature}
        return acted(policy_of(learners["mtdiff-p-onehot"], **changes), [0, 1], seed=seed)

    for sampler in ("ddpm", "ddim"):
        assert not torch.equal(actions(sampler, 0.2, 0), actions(sampler, 0.9, 0))
    assert torch.equal(actions("ddim", 0.0, 0), actions("ddim", 0.0, 1))
    assert not torch.equal(actions("ddpm", 0.0, 0), actions("ddpm", 0.0, 1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns_to_act_as_the_data_of_each_task_do(tmp_path: Path, algorithm: str) -> None:
    """Observations are the same in all tasks: the prompt or the one-hot vector alone tells."""
    wanted = {TASKS[0]: 0.6, TASKS[1]: -0.6}
    rng, writer = np.random.default_rng(0), StoreWriter(tmp_path / "s", {"source": "random"}, SPEC)
    for name, action in wanted.items():
        with writer.task(name) as task:
            for add in (task.add, task.add, task.add_prompt):
                episode = make_episode(rng, 100)
                add(episode._replace(actions=np.full_like(episode.actions, action)))
    trainer = trainer_of(
        writer.finish(list(wanted)), algorithm, learning_rate=5e-3, steps=160, batch_per_task=16,
        context_length=1, horizon=2, layers=1, average_decay=0.95,
    )  # fmt: skip
    for _ in range(160):
        trainer.train_step()
    policy = trainer.learner.policy(160)
    for sampler in ("ddpm", "ddim"):
        policy.settings = dataclasses.replace(policy.settings, sampler=sampler)
        actions = acted(policy, [0, 0, 1, 1], steps=3)
        expected = torch.tensor([0.6, 0.6, -0.6, -0.6])[:, None].expand(3, 4, 4)
        torch.testing.assert_close(actions, expected, rtol=0, atol=0.15)


def test_plans_are_drawn_as_is_asked_of_a_run(store: DataStore, tmp_path: Path) -> None:
    sizes = ("--horizon", "4", "--diffusion-steps", "8", "--sampling-steps", "4")
    runs.begin(store, tmp_path / "run", *sizes, algorithm="mtdiff-p")
    asked = ({}, {"sampling_steps": 2}, {"sampler": "ddpm"})
    policies = [load_policy(tmp_path / "run", **options) for options in asked]
    own = {"guidance": 1.2, "temperature": 0.5, "replan_every": 1}
    assert [policy.plans for policy in policies] == [
        own | {"sampler": "ddim", "sampling_steps": 4},
        own | {"sampler": "ddim", "sampling_steps": 2},
        own | {"sampler": "ddpm", "sampling_steps": 8},
    ]
    first, second, third = (acted(policy, [0, 1]) for policy in policies)
    policies[0].settings = dataclasses.replace(policies[0].settings, sampling_steps=2)
    assert torch.equal(acted(policies[0], [0, 1]), second)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    with pytest.raises(UserError, match="sampling_steps 9 is above diffusion_steps 8: lower it"):
        load_policy(tmp_path / "run", sampling_steps=9)
    with pytest.raises(UserError, match="all steps of the diffusion: leave sampling_steps out"):
        load_policy(tmp_path / "run", sampler="ddpm", sampling_steps=2)
    with pytest.raises(UserError, match="sampler is 'DDPM': give ddpm or ddim"):
        load_policy(tmp_path / "run", sampler="DDPM")


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 33, "heads": 3}, "embed_dim 33 is odd or not a multiple of heads 3"),
        ({"embed_dim": 32, "heads": 3}, "embed_dim 32 is odd or not a multiple of heads 3"),
        ({"sampling_steps": 17}, "sampling_steps 17 is above diffusion_steps 16: lower it"),
        ({"replan_every": 6}, "replan_every 6 is above horizon 5: lower it"),
        ({"temperature": 1.5}, r"temperature is 1\.5: give a share in \[0, 1\]"),
        ({"first_action_weight": 0.0}, "first_action_weight is 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    changes: dict[str, object], message: str
) -> None:
    check(configure("mtdiff-p", **SMALL))
    check(configure("mtdiff-p", **{**SMALL, "sampler": "ddpm", "sampling_steps": 17}))  # unread
    with pytest.raises(UserError, match=message):
        check(configure("mtdiff-p", **{**SMALL, **changes}))


def test_a_checkpoint_of_another_size_is_refused(store: DataStore) -> None:
    trainer = trainer_of(store, layers=1)
    checkpoint = Checkpoint(Path("checkpoint"), 0, trainer.learner.tensors())
    with pytest.raises(UserError, match=r"is of another model size: model\.blocks"):
        trainer_of(store).load(checkpoint)
    setup = make_setup(store, configure("mtdiff-p", **SMALL))
    with pytest.raises(UserError, match=r"is of another model size: model\.blocks"):
        find("mtdiff-p").learner(setup).load(checkpoint)


def test_there_are_no_masks_to_vote(learners: dict[str, MTDiffLearner]) -> None:
    with pytest.raises(UserError, match="has no masks to vote"):
        policy_of(learners["mtdiff-p"]).use_voted_mask()


def test_unseen_tasks_are_refused(store: DataStore) -> None:
    setup = make_setup(store, configure("mtdiff-p", **SMALL))
    checkpoint, unseen = Checkpoint(Path("checkpoint"), 0, {}), Unseen(Path("store"))
    with pytest.raises(UserError, match="mtdiff-p cannot act on unseen tasks"):
        unseen_policy(setup, checkpoint, unseen, [store.task(TASKS[0])], "")
