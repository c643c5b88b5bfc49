"""One training step of either package behind one interface: same weights, rows, loss, optimiser and precision.

Cross-entropy over the suffix, averaged over tokens (what transformers computes), clipping at 1, AdamW without decay.
The peer runs as its users run it: `labels` given, loss.backward(), clip_grad_norm_, step.
"""

import contextlib
from pathlib import Path
from typing import Any, Protocol

import torch

from helpers.steps import make_step

LR = 1e-5
RANK, ALPHA = 16, 32
ADAPTERS = ("lora", "qlora")
PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


SKIPPED = ["lm_head", "vision_tower", "multi_modal_projector"]  # 4 bits for the decoder's matrices, on both sides


class TrainSide(Protocol):
    """One package with a model, its optimiser and a batch."""

    def load(
        self, folder: Path, method: str, precision: str, rows: int, n_text: int, n_targets: int, device: str
    ) -> None: ...

    def step(self) -> float:
        """One update; the loss before it."""

    def parameters(self) -> list[torch.Tensor]:
        """Everything that the model holds."""


class OurStep:
    """This package."""

    def load(
        self, folder: Path, method: str, precision: str, rows: int, n_text: int, n_targets: int, device: str
    ) -> None:
        from paligemma.api.loading import QUANTIZE, fill
        from paligemma.checkpoints import open_checkpoint
        from paligemma.models.lora import LoraOptions, add_lora
        from paligemma.models.paligemma import PaliGemmaModel
        from paligemma.train.loop import FitOptions, default_loss, prepare
        from paligemma.train.optim import Optimizer, OptimOptions
        from paligemma.train.schedule import Schedule
        from paligemma.train.state import TrainState

        dtype = torch.bfloat16 if method in ADAPTERS and precision == "bfloat16" else torch.float32
        with open_checkpoint(folder) as checkpoint:
            config = checkpoint.config
            model = PaliGemmaModel(config, device="meta", dtype=dtype)
            packed = QUANTIZE["nf4"] if method == "qlora" else None
            fill(model, checkpoint, torch.device(device), packed=packed)
        frozen: tuple[tuple[str, None], ...] = (("image", None),) if method == "frozen" else ()
        if method in ADAPTERS:
            add_lora(model, LoraOptions(rank=RANK, alpha=ALPHA))
        self.options = FitOptions(steps=1000, normalization="per_token", precision=precision)  # type: ignore[arg-type]
        prepare(model, self.options)
        chosen = OptimOptions(lr=LR, schedule=Schedule(), schedules=frozen)
        optimizer = Optimizer(model.named_parameters(), chosen, total_steps=1000)
        self.state, self.loss = TrainState(model, optimizer), default_loss(self.options)
        self.data = make_step(config, rows, n_text, n_targets)

    def step(self) -> float:
        from paligemma.train.loop import train_step
        from paligemma.train.ranks import Ranks

        return train_step(self.state, self.data, self.options, self.loss, Ranks()).loss

    def parameters(self) -> list[torch.Tensor]:
        return [*self.state.model.parameters(), *self.state.model.buffers()]


class PeerStep:
    """transformers, with peft for adapters."""

    def load(
        self, folder: Path, method: str, precision: str, rows: int, n_text: int, n_targets: int, device: str
    ) -> None:
        from transformers import BitsAndBytesConfig, PaliGemmaForConditionalGeneration

        from paligemma.checkpoints import open_checkpoint

        dtype = torch.bfloat16 if method in ADAPTERS and precision == "bfloat16" else torch.float32
        more: dict[str, Any] = {}
        if method == "qlora":
            more["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=SKIPPED,
            )  # fmt: skip
            more["device_map"] = device
        model: Any = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **more)
        if method != "qlora":
            model.to(device)
        if method == "frozen":
            for name, parameter in model.named_parameters():
                if "vision_tower" in name or "multi_modal_projector" in name:
                    parameter.requires_grad_(False)
        if method in ADAPTERS:
            from peft import LoraConfig, get_peft_model

            wanted = rf".*language_model.*\.({PROJECTIONS})"
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=wanted))
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        self.is_bfloat16, self.device = precision == "bfloat16", device
        with open_checkpoint(folder) as checkpoint:
            batch = make_step(checkpoint.config, rows, n_text, n_targets).parts[0].to(device)
        image = model.config.image_token_id
        self.inputs = {
            "input_ids": batch.tokens.masked_fill(batch.mask_image, image),
            "pixel_values": batch.pixels,
            "attention_mask": batch.mask_input.long(),
            "token_type_ids": batch.mask_loss.long(),
            "labels": batch.tokens.masked_fill(~batch.mask_loss, -100),
        }

    def step(self) -> float:
        autocast = torch.autocast(self.device, torch.bfloat16) if self.is_bfloat16 else contextlib.nullcontext()
        with autocast:
            loss = self.model(**self.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def parameters(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


TRAIN_SIDES: dict[str, type[OurStep] | type[PeerStep]] = {"paligemma": OurStep, "transformers": PeerStep}
