"""The profile of a model for AdaCorrection, measured on a few uncached trajectories: see adacorr.model_profile.

Beside each uncached trajectory runs a cached one of the same noise. Where they differ is how a cached state is wrong,
and what the network makes of the difference is how it answers such errors (adacorr.placement). A second look at each
state, with a part of its noise renewed, is how the network answers noise (adacorr.injected_noise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adacorr.calibration.noise_response import NoiseResponse
from adacorr.gates import GateBasis, conditions, fit_gate_basis, null_condition
from adacorr.model_profile import KEPT, KINDS, KnownErrors
from adacorr.placement import Process, best_schedules, ddim_steps
from adacorr.schedules import tabulate
from adacorr.store import ComputedRows, FreshSums, with_rest

GATE_ERROR = 0.06  # relative, as the final layer sees it; what the basis leaves is forecast, too
BAND_EDGES = (1.01, 2.5, 4.5, 8.5)  # of spatial frequency, in cycles per 32 pixels (or latent pixels)
ROUNDING = 1e-5  # relative difference of states below which it is none
POWER_STEPS = 6  # at which the size of the branches is looked at, to fit the gates by
ENOUGH = 0.0041  # error of the final state, in shares of its contrast, below which placement does not matter
LEADING = 512  # eigenvalues of a covariance that are looked for first; a model has some 200 that count


class TrajectoryCalibration:
    """Observes uncached runs of a DiT under a deterministic sampler on timesteps (P,) in sampling order.

    alpha_bar (P,) their signal power. runs: (timesteps (S,), alpha_bar (S,)) of the runs that schedules are made for.
    `guided` channels, the first ones, take part in guidance. Uses the model's parts as `DiT.forward` does.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: Tensor,
        alpha_bar: np.ndarray,
        runs: Sequence[tuple[np.ndarray, np.ndarray]],
        cfg_scale: float,
        guided: int,
    ):
        self.model, self.timesteps, self.alpha_bar, self.runs = model, timesteps, alpha_bar, runs
        self.cfg_scale, self.guided = cfg_scale, guided
        self.halves = 1 if cfg_scale == 1.0 else 2
        self.images = 0
        self.basis: GateBasis | None = None

    @torch.no_grad()
    def add(
        self,
        sampler,
        noise: Tensor,
        labels: Tensor | None,
        cached: list[Tensor],
        stepped: Callable[[int], object] = lambda images: None,
    ) -> None:
        """Observe images: noise (n, C, H, W), labels (n,), and `cached` (P of (n, C, H, W)): the states that a cached
        run of the same noise had after each step. `sampler` is that of both runs; `stepped` is called with n after
        each step."""
        if self.basis is None:
            self._begin(labels, cached)
        n, x = len(noise), sampler.prepare(noise)
        seen: list[list[Tensor]] = [[] for _ in range(self.halves)]
        for step in range(len(self.timesteps)):
            c = self._rows(step, n, labels)
            tokens, out, fresh = self._evaluate(step, x, c, labels)
            processes = self._differences(fresh.values[: self.halves])
            for half, sums in enumerate(processes):
                self.sums[half][step] += sums.double().sum(dim=(0, 2))
                seen[half].append(self._to_image(sums @ self.projection[half]))
            self.spread[step] += out[:n].float().std(dim=2, correction=0).mean(dim=1).double().sum()
            decoded = self._decode(out, c)
            if step and float((cached[step - 1] - x).norm()) > ROUNDING * float(x.norm()):
                self._add_response(step, cached[step - 1] - x, x, tokens, out, decoded, c)
            sigma = float(np.sqrt(1.0 - self.alpha_bar[step]))
            seeds = [(self.images + i) * len(self.timesteps) + step for i in range(n)]
            predicted = self._guide(decoded)
            change = self.noise.change(predicted, seeds)
            held, *answers = self._answers_to(sigma * change, x, tokens, out, decoded, c)
            guided = answers[0] + (self.cfg_scale - 1.0) * answers[1] if self.halves == 2 else answers[0]
            self.noise.add(step, change, held, answers, guided)
            x = sampler.step(step, x, predicted, None)
            stepped(n)
        self._add_spectrum(torch.cat([torch.stack(images) for images in seen], dim=2))
        self.power += float(x.square().sum())
        self.images += n

    def fit(self) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays of the profile, notes); ValueError before anything was observed."""
        if not self.images:
            raise ValueError("adacorr: nothing was observed; calibrate on one image at least")
        kinds, count = KINDS[: self.halves], self.images * self.tokens
        means = [sums / count for sums in self.sums]
        reading = self._reading()
        readout = with_rest(self.basis.basis.double().cpu().numpy()) * reading[:, None]
        arrays = {"timesteps": self.timesteps.double().cpu().numpy(), "basis": self.basis.basis.cpu().numpy()}
        arrays["gate_weight"] = self.gate_weight.half().cpu().numpy()
        processes, spectrum = [], self._centred(means)  # (F, P * halves * E, P * halves * E) per pixel
        size = len(self.timesteps), self.halves, self.basis.rank + 1  # P, halves, E: the entries of a step
        factors = _factor(spectrum)
        factors = factors.reshape(len(spectrum), *size, factors.shape[2])
        spectrum = spectrum.reshape(len(spectrum), *size, *size)
        held, answers = self._answers()
        for half, kind in enumerate(kinds):
            own_spectrum = spectrum[:, :, half, :, :, half]  # (F, P, E, P, E)
            covariance = np.einsum("fiqjq->ij", own_spectrum[:, :, :-1, :, :-1])
            rest = own_spectrum[:, :, -1, :, -1].sum(axis=0)
            seen = np.einsum("iq,fiqir,ir->i", readout, own_spectrum, readout)
            arrays[f"readout_{kind}"] = np.sqrt(seen / np.diag(covariance))
            weight = 1.0 if half == 0 else self.cfg_scale - 1.0
            processes.append(Process(factors[:, :, half], covariance, rest, *answers[half], KEPT[kind], weight))
            arrays[f"mean_{kind}"] = means[half].half().cpu().numpy()
            arrays |= {f"covariance_{kind}": covariance, f"rest_{kind}": rest}
        arrays |= self.noise.fit()
        arrays["contrast"] = np.sqrt(self.power / self.images / self.pixels)
        arrays["runs"] = np.array([len(timesteps) for timesteps, _ in self.runs])
        errors = KnownErrors(arrays["timesteps"], held, readout, processes)
        arrays |= {"reading": reading, **errors.arrays}
        for timesteps, alpha_bar in self.runs:
            model = errors.of_run(timesteps, ddim_steps(alpha_bar))
            found = best_schedules(model, (ENOUGH * arrays["contrast"]) ** 2)
            rows, expected = tabulate(found, len(timesteps), model.guided)
            own = {"timesteps": timesteps.astype(np.float64), "schedules": rows, "expected": expected}
            arrays |= {f"{name}_{len(timesteps)}": array for name, array in own.items()}
        return arrays, {"images": self.images, "gate_directions": self.basis.rank, "gate_error": self.basis.error}

    # -------------------------------------------------------------------------------- before the first image

    def _begin(self, labels: Tensor | None, cached: list[Tensor]) -> None:
        model, steps = self.model, len(self.timesteps)
        final, patch, channels = model.final_layer, model.patch_size, model.in_channels
        self.tokens, self.pixels = model.pos_embed.shape[1], cached[0][0].numel()
        reference = null_condition(model, self.timesteps)
        scale = 1 + final.modulation(reference)[1].float()  # (P, D)
        self.reading = scale.norm(dim=1) / scale.mean(dim=0).norm()
        weight = final.linear.weight.float().unflatten(0, (patch * patch, -1))[:, :channels]  # (p * p, C, D)
        projection = (scale.mean(dim=0) * weight).permute(2, 0, 1)  # (D, p * p, C)
        projection = projection - projection.mean(dim=0)  # the final norm takes the mean over channels out
        guided = projection.clone()
        guided[:, :, self.guided :] = 0
        self.projection = [projection.flatten(1), guided.flatten(1)][: self.halves]
        self.gate_weight = self._branch_power(labels, cached) * projection.flatten(1).norm(dim=1)
        classes = None if labels is None else torch.arange(model.num_classes, device=reference.device)
        known = conditions(model, self.timesteps, classes, self.halves)
        self.basis = fit_gate_basis(model.blocks, reference, known, GATE_ERROR, self.gate_weight)
        entries, width = self.basis.rank + 1, model.pos_embed.shape[2]  # of a step: the last one is the rest
        device, kind = reference.device, torch.float64
        self.sums = [torch.zeros(steps, entries, width, dtype=kind, device=device) for _ in range(self.halves)]
        self.bands = _bands(model.input_size, device)
        rows = steps * self.halves * entries
        self.grams = torch.zeros(len(self.bands), rows, rows, dtype=kind, device=device)
        self.spread = torch.zeros(steps, dtype=kind, device=device)
        # Of a response: along the error and in size, for what is held, the conditional half and the difference.
        self.answered = torch.zeros(steps, 1 + self.halves, 2, len(self.bands), dtype=kind, device=device)
        self.asked = torch.zeros(steps, len(self.bands), dtype=kind, device=device)
        self.power = 0.0
        size = channels, model.input_size, model.input_size
        self.noise = NoiseResponse(steps, size, self.halves, device)

    def _branch_power(self, labels: Tensor | None, cached: list[Tensor]) -> Tensor:
        """(B, D) rms of the branches' outputs over tokens, images and some steps of a cached run."""
        power, steps = 0.0, np.linspace(1, len(cached) - 1, POWER_STEPS).astype(int)
        for step in steps:
            c, x = self._rows(step, len(cached[0]), labels), self.model.embed(cached[step - 1].to(self._dtype))
            branches: list[Tensor] = []
            for block in self.model.blocks:
                x = block(x, c[: len(x)], lambda *pair, to=branches: to.extend(pair))
            power = power + torch.stack([branch.float().square().mean(dim=(0, 1)) for branch in branches])
        return (power / len(steps)).sqrt()

    # ------------------------------------------------------------------------------------- one evaluation

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.pos_embed.dtype

    def _rows(self, step: int, n: int, labels: Tensor | None) -> Tensor:
        """Conditioning (halves * n, D) of the rows [conditional; unconditional]."""
        t = self.timesteps[step].expand(n)
        null = [null_condition(self.model, t)] * (self.halves - 1)
        return torch.cat([self.model.condition(t, labels), *null])

    def _evaluate(self, step: int, x: Tensor, c: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, FreshSums]:
        """The stack on states x (n, ...): its input and output (halves * n, T, D), the branch sums and their rest."""
        everyone = np.arange(len(x))
        label = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
        loadings = [self.basis.loadings[0][:, label]]
        if self.halves == 2:
            loadings.append(self.basis.loadings[1].expand(-1, len(x), -1, -1))
        computed = ComputedRows(everyone, everyone[: len(x) * (self.halves - 1)])
        fresh = FreshSums(computed, torch.cat(loadings, dim=1), self.basis.basis[step])
        tokens = self.model.embed(x.to(self._dtype)).repeat(self.halves, 1, 1)
        out = tokens
        for block in self.model.blocks:
            out = block(out, c, fresh.tap)
        fresh.finish(tokens, out, None)
        return tokens, out, fresh

    def _decode(self, tokens: Tensor, c: Tensor) -> list[Tensor]:
        """The noise (n, C, H, W) of each half."""
        out = self.model.decode(tokens, c)[:, : self.model.in_channels].float()
        return list(out.unflatten(0, (self.halves, -1)))

    def _guide(self, halves: list[Tensor]) -> Tensor:
        out = halves[0].clone()
        if self.halves == 2:
            k = self.guided
            out[:, :k] = halves[1][:, :k] + self.cfg_scale * (halves[0][:, :k] - halves[1][:, :k])
        return out

    @staticmethod
    def _differences(halves: Sequence[Tensor]) -> list[Tensor]:
        """What the conditional half has, and how the other one differs from it."""
        return [halves[0], *(halves[0] - other for other in halves[1:])]

    def _to_image(self, patches: Tensor) -> Tensor:
        """(n, E, T, p * p * C) -> (n, E, C, H, W)."""
        return self.model.unpatch(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])

    # ------------------------------------------------------------------------------------ what is added up

    def _answers_to(self, change: Tensor, x, tokens, out, decoded, c) -> list[Tensor]:
        """What the layers outside of the blocks make of a change of the state x, and what each process does."""
        changed = self.model.embed((x + change).to(self._dtype)).repeat(self.halves, 1, 1)
        skipped = self._decode(changed + (out - tokens), c)[0] - decoded[0]
        for block in self.model.blocks:
            changed = block(changed, c)
        answers = [new - old for new, old in zip(self._decode(changed, c), decoded, strict=True)]
        answers = self._differences(answers)
        if self.halves == 2:
            answers[1][:, self.guided :] = 0
        return [skipped, *answers]

    def _add_response(self, step: int, error: Tensor, *where) -> None:
        """How the network, and what lies outside of its blocks, answer the error of a cached state."""
        answers = self._answers_to(error, *where)
        error = torch.fft.fft2(error, norm="ortho")
        self.asked[step] += self._by_band(error.abs().square())
        for i, answer in enumerate(answers):
            spectrum = torch.fft.fft2(answer, norm="ortho")
            self.answered[step, i, 0] += self._by_band((spectrum * error.conj()).real)
            self.answered[step, i, 1] += self._by_band(spectrum.abs().square())

    def _by_band(self, power: Tensor) -> Tensor:
        """(..., H, W) -> (F,) sums."""
        return torch.stack([power[..., band].double().sum() for band in self.bands])

    def _add_spectrum(self, images: Tensor) -> None:
        """images (P, n, halves * E, C, H, W) of the processes: products of all pairs (P, halves, E), by band."""
        spectrum = torch.fft.fft2(images, norm="ortho").transpose(1, 2).flatten(0, 1)  # (P * halves * E, n, C, H, W)
        for gram, band in zip(self.grams, self.bands, strict=True):
            values = torch.view_as_real(spectrum[..., band]).flatten(1)
            gram += (values @ values.T).double()

    # ------------------------------------------------------------------------------------------- the fit

    def _centred(self, means: list[Tensor]) -> np.ndarray:
        """(F, P * halves * E, P * halves * E) covariance per pixel of the processes about their means (P, E, D)."""
        patch = torch.cat([mean.float() @ own for mean, own in zip(means, self.projection, strict=True)], dim=1)
        patch = patch[:, :, None].expand(-1, -1, self.tokens, -1)
        spectrum = torch.fft.fft2(self._to_image(patch), norm="ortho").flatten(0, 1)  # (P * halves * E, C, H, W)
        out = []
        for gram, band in zip(self.grams, self.bands, strict=True):
            values = torch.view_as_real(spectrum[..., band]).flatten(1).double()
            out.append(gram / self.images - values @ values.T)
        return torch.stack(out).cpu().numpy() / self.pixels

    def _reading(self) -> np.ndarray:
        """(P,) how much a step's final layer makes of the branch sums."""
        return (self.reading.double() / (self.spread / self.images)).cpu().numpy()

    def _answers(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """held (P, F); and for each process its response (P, F) and scatter (P, F)."""
        asked, answered = self.asked.cpu().numpy(), self.answered.cpu().numpy()
        known = np.flatnonzero((asked > 0).all(axis=1))
        if not len(known):
            why = "cached steps never differed from uncached ones, as in a model whose blocks do nothing yet"
            raise ValueError(f"adacorr: {why}: train it further, or give --calibrate off")
        return split_answers(asked, answered, known)


def split_answers(
    asked: np.ndarray, answered: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """held (P, F); and for each process its response (P, F) and scatter (P, F).

    asked (P, F): power of the errors. answered (P, kinds, 2, F): products of the answers of each kind with the errors,
    and their power. known: the steps at which there were errors. Where the states agree, as before the first skipped
    step, the next step that tells stands in.
    """
    source = known[np.searchsorted(known, np.arange(len(asked))).clip(max=len(known) - 1)]
    shares = answered[source] / asked[source][:, None, None]  # (P, kinds, 2, F)
    along, size = shares[:, :, 0], shares[:, :, 1]
    scatter = np.sqrt(np.maximum(size - along**2, 0.0))
    return along[:, 0], [(along[:, i], scatter[:, i]) for i in range(1, along.shape[1])]


def _bands(size: int, device: torch.device) -> list[Tensor]:
    """(H, W) bool masks of the bands of spatial frequency that an image of that size has."""
    cycles = torch.fft.fftfreq(size, device=device) * 32
    radius = (cycles[:, None] ** 2 + cycles**2).sqrt()
    edges = (-1.0, *BAND_EDGES, float("inf"))
    masks = [(radius > low) & (radius <= high) for low, high in zip(edges, edges[1:], strict=False)]
    return [mask for mask in masks if mask.any()]


def _factor(covariance: np.ndarray) -> np.ndarray:
    """(F, N, N) -> (F, N, r) with factor @ factor^T the covariance, less what is far below every forecast's error."""
    least = 1e-6 * np.trace(covariance, axis1=1, axis2=2)[:, None]
    values, vectors = _leading(covariance, LEADING)
    if (values > least).all(axis=1).any():  # there may be more of them
        values, vectors = np.linalg.eigh(covariance)
    rank = int((values > least).sum(axis=1).max())
    values, vectors = values[:, ::-1][:, :rank], vectors[:, :, ::-1][:, :, :rank]
    return vectors * np.sqrt(np.maximum(values, 0.0))[:, None]


def _leading(covariance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues (F, count), in rising order, and their vectors (F, N, count), where they fall off fast.

    Two steps of subspace iteration from random vectors (Halko et al., arXiv 0909.4061): far less work than all N.
    """
    size = covariance.shape[1]
    basis = np.random.default_rng(0).standard_normal((size, min(count, size)))
    for _ in range(2):
        basis = np.linalg.qr(covariance @ basis)[0]
    values, vectors = np.linalg.eigh(basis.transpose(0, 2, 1) @ covariance @ basis)
    return values, basis @ vectors
