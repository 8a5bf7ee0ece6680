"""Show batches of a run and question its model, in one process: `python examples/notebook.py RUN IMAGE QUESTION`.

Each `# %%` begins a cell for editors that open such files as notebooks. Nothing needs a launcher or a GPU.
"""

# %% Arguments: a run's directory (`make demo` leaves runs/demo/stage3), an image and a question about it
import sys

from megatron_qwenvl import Generator, build_loader, load_config, load_model

run, image, question = sys.argv[1:4]

# %% The run's configuration; `load_config("tiny_stage3", ["--data.root", "data/demo"])` starts from a recipe
config = load_config(f"{run}/config.yaml")
print(f"{config.name}: {config.train.steps} steps of {config.data.global_batch_size} samples")

# %% The first two steps of its data, as one data-parallel rank would read them
for step in build_loader(config):
    if step.info.step == 2:
        break
    for number, batch in enumerate(step):
        print(
            f"step {step.info.step} micro-batch {number}: {batch.real_tokens} tokens, {batch.num_images} images"
        )

# %% The newest checkpoint, of any parallel layout; `with` closes the model and restores torch's settings
with load_model(config, run) as model:
    parameters = sum(parameter.numel() for parameter in model.stage.parameters())
    print(f"{parameters} parameters on {model.runtime.device}")
    generator = Generator.of(model)
    (answer,) = generator.answer([model.prompt({"task": "vqa", "question": question}, [image])])
    print(f"{question} {answer}")
