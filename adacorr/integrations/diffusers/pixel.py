"""A diffusers pipeline for class-conditional DiTs that work on pixels, as the bundled one does."""

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from adacorr.integrations.diffusers.schedule import linear_alphas
from adacorr.linear_steps import scheduler_step


def ddim_step(scheduler: DDIMScheduler, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The state after timestep t along the scheduler's own timesteps (Song et al. 2021, Eq. 12, deterministic).

    x (n, C, H, W) float32 and the predicted noise `out` -> the same. DDIMScheduler itself takes t - 1000 // S for the
    next timestep, which is none of its own under "linspace". Here it is the next one, and after the last the image: the
    sampler `ddim` of this repository.
    """
    config = scheduler.config
    known = linear_alphas(config.beta_start, config.beta_end, config.num_train_timesteps)
    later = scheduler.timesteps[scheduler.timesteps < t]
    here, after = known[int(t)], known[int(later[0])] if len(later) else 1.0
    x0 = float(np.sqrt(1.0 / here)) * x - float(np.sqrt(1.0 / here - 1.0)) * out
    return float(np.sqrt(after)) * x0 + float(np.sqrt(1.0 - after)) * out


class PixelDiTPipeline(DiffusionPipeline):
    """Images of a DiT without a VAE.

    id2label           class names by number, as strings
    timestep_shift     what the transformer's timestep frequencies are shifted by: diffusers always takes 1, the DiT
                       release was trained with 0, and 29 dB lie between the images
    checkpoint_sha256  of the file that the weights came from, which profiles are held to
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        # Classes alone: when it loads a pipeline, diffusers 0.36 looks at these types, and knows no unions with None.
        id2label: dict = None,
        timestep_shift: float = 0.0,
        checkpoint_sha256: str = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label, timestep_shift=timestep_shift, checkpoint_sha256=checkpoint_sha256)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = timestep_shift

    @classmethod
    def from_weights(
        cls,
        state_dict: dict[str, Tensor],
        config: dict[str, Any],
        class_names: list[str] | None = None,
        checkpoint_sha256: str | None = None,
    ) -> "PixelDiTPipeline":
        """A pipeline of the weights and arguments of a DiTTransformer2DModel that was trained as the release was.

        Its scheduler is DDIM on even timesteps.
        """
        transformer = DiTTransformer2DModel(**config).eval().requires_grad_(False)
        transformer.load_state_dict({**transformer.state_dict(), **state_dict})  # positions are computed
        schedule = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
        scheduler = DDIMScheduler(**schedule, timestep_spacing="linspace")
        names = {str(i): name for i, name in enumerate(class_names or [])} or None
        return cls(transformer, scheduler, names, checkpoint_sha256=checkpoint_sha256)

    @staticmethod
    def advance(scheduler: SchedulerMixin, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The state after timestep t, for the predicted noise `out` and the state x (n, C, H, W) float32 before it."""
        return (ddim_step if isinstance(scheduler, DDIMScheduler) else scheduler_step)(scheduler, out, t, x)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of the labels (n,), from Gaussian `latents` (n, C, H, W) or drawn ones.

        output_type: "pil", "np" (n, H, W, C) in 0..1 or "pt", the final states in -1..1 (n, C, H, W). Guidance acts on
        all channels, and is off at a scale of 1 and below. ValueError for a label out of range.
        """
        config, n = self.transformer.config, len(class_labels)
        null = config.num_embeds_ada_norm
        if not all(0 <= label < null for label in class_labels):
            raise ValueError(f"class_labels {list(class_labels)} must lie within 0..{null - 1}")
        device, dtype, guided = self._execution_device, self.transformer.dtype, guidance_scale > 1
        if latents is None:
            shape = (n, config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)
        labels = torch.tensor([*class_labels, *[null] * (n * guided)], device=device)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            rows = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            times = t.to(device).expand(len(rows))
            out = self.transformer(rows.to(dtype), timestep=times, class_labels=labels).sample
            out = out[:, : config.in_channels]
            if guided:
                cond, uncond = out.chunk(2)
                out = uncond + guidance_scale * (cond - uncond)
            x = self.advance(self.scheduler, out.float(), t, x)
        images = x
        if output_type != "pt":
            images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
