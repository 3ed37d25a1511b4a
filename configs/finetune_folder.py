r"""Fine-tunes an ImageNet ResNet-50 on one's own photos, DIR/train/CLASS and DIR/val/CLASS.

python -m resjax.convert resnet50.safetensors --model resnet50 --workdir runs/resnet50
python train.py --config=configs/finetune_folder.py --config.num_classes=N \
    --config.data.dir=DIR
python eval.py --workdir=runs/finetune_folder --step=best
python -c "import resjax; from PIL import Image; \
    run = resjax.restore('runs/finetune_folder', 'best'); \
    print(run.class_names[run.predict(Image.open('photo.jpg')).argmax()])"

N is the number of folders; resnet50.safetensors is model.safetensors of
https://huggingface.co/timm/resnet50.tv_in1k; any run can be started from, with init_from.
Change first lr_per_256 (a third, three times), then num_epochs. Of thousands of images,
freeze_at=0 may be better; of few, what the features are worth without training tells
`python -m figures.transfer`. Of fewer than 16 images in all, lower batch_size.
If left and right differ, as in text, --config.data.recipe=none neither flips nor crops.
"""

from resjax.config import CheckpointConfig, Config, DataConfig


def get_config() -> Config:
    """All but the first layers at a small rate, a new classifier at ten times that."""
    return Config(
        model="resnet50",
        num_classes=2,
        init_from="runs/resnet50",
        freeze_at=2,  # the stem and the first stage, whose features serve any photos
        head_lr_multiplier=10,
        batch_size=16,
        lr_per_256=0.01,
        schedule="cosine",
        warmup="none",
        num_epochs=20,
        weight_decay=1e-4,
        data=DataConfig(name="folder", image_size=224),
        checkpoint=CheckpointConfig(keep=1),
        log_every_steps=10,
    )
