"""The job with Lightning: python with_lightning.py, which starts its own second process."""

import math
from functools import partial

import lightning
import task
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self, iterations):
        super().__init__()
        self.model = task.LanguageModel()
        self.factor = partial(task.cosine, total=iterations // task.ACCUMULATE)

    def training_step(self, batch, index):
        loss = task.loss_of(self.model, batch)
        self.log("train/loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.log("train/norm", torch.nn.utils.get_total_norm([each.grad for each in self.parameters()]))

    def validation_step(self, batch, index):
        self.log("val/loss", task.loss_of(self.model, batch), sync_dist=True, batch_size=len(batch))

    def on_validation_epoch_end(self):
        value = math.exp(self.trainer.callback_metrics["val/loss"])
        self.log("val/perplexity", value, sync_dist=True)
        self.print(f"iteration {self.trainer.fit_loop.total_batch_idx + 1}: perplexity {value:.4f}")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(task.parameter_groups(self.model), lr=task.RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(options):
    lightning.seed_everything(0)
    train, validation = task.datasets()
    saving = ModelCheckpoint(
        options.out / "checkpoints",
        every_n_train_steps=options.save // task.ACCUMULATE,
        save_top_k=3,
        monitor="step",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=False,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        precision="bf16-mixed",
        max_steps=options.iterations // task.ACCUMULATE,
        accumulate_grad_batches=task.ACCUMULATE,
        gradient_clip_val=task.CLIP,
        val_check_interval=options.evaluate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=options.tell // task.ACCUMULATE,
        logger=TensorBoardLogger(options.out, "board", version=0),
        callbacks=[saving, EarlyStopping("val/loss", patience=task.PATIENCE), LearningRateMonitor("step")],
    )
    module = Module(options.iterations)
    loaders = DataLoader(train, task.BATCH, shuffle=True, drop_last=True), DataLoader(validation, 64)
    trainer.fit(module, *loaders, ckpt_path="last")
    module.print("digest", task.digest(module.model))


if __name__ == "__main__":
    main(task.Options.read())
