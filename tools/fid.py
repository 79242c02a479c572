"""Frechet distances, Inception scores and kernel distances of images."""

from __future__ import annotations

import click

from art_edm.runtime.cli import LazyGroup


@click.group(cls=LazyGroup, invoke_without_command=True, lazy={
    "calc": ("art_edm.compare.folder_commands:calc_command", "Compare images with the statistics of a data set; "
             "prints the FID alone, other metrics by name."),
    "compare": ("art_edm.compare.commands:compare_command",
                "Score several folders of images, and their differences to the first name."),
    "gen": ("art_edm.compare.commands:gen_command",
            "Sample on several grids and score the images without writing them."),
    "ref": ("art_edm.compare.folder_commands:ref_command", "Write the statistics of a data set that `calc` needs."),
})
@click.pass_context
def main(context: click.Context) -> None:
    """Frechet distances, Inception scores and kernel distances of images, on a CPU, a GPU or many.

    \b
    Examples:
      python tools/fid.py calc --images=fid-tmp --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz
      python tools/fid.py calc --images=fid-tmp --ref=img512.pkl --metrics=fid,is --out=scores.json
      python tools/fid.py ref --data=my-dataset.zip --dest=my-dataset.npz
      torchrun --standalone --nproc_per_node=8 tools/fid.py calc --images=fid-tmp --ref=my-dataset.npz
      python tools/fid.py calc --images=digits --ref=mnist.npz --detector=lenet --num=10000
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


if __name__ == "__main__":
    main(prog_name="fid.py")
