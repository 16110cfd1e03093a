"""``pydenoise denoise`` on a hyperspectral cube: FastHyDe, with noise and subspace estimated from the cube itself."""

import argparse

from pydenoise.cli.main import CommandError

NOISES = ("iid", "non-iid", "poisson")
DENOISERS = ("ffdnet", "wavelet")
OPTIONS = ("noise", "rank", "denoiser", "bands_first", "batch", "blend")  # of cubes alone


def add_options(parser: argparse.ArgumentParser, positive) -> None:
    """Add the options that are for cubes."""
    group = parser.add_argument_group("cubes of many bands (.npy [H, W, bands]; TIFF)")
    add = group.add_argument
    noise = "kind of noise: of one power, of a power of its own in each band (the default), or counts"
    add("--noise", choices=NOISES, help=noise)
    add("--rank", type=positive, metavar="K", help="components that are kept (default: estimated)")
    add("--denoiser", choices=DENOISERS, help="what denoises a component (default: ffdnet; wavelet needs no weights)")
    add("--bands-first", action="store_true", default=None, help="the .npy file holds [bands, H, W]")
    add("--batch", type=positive, metavar="N", help="so many tiles at once (default: 1)")
    blend = "blend neighbouring tiles over their margins, for margins less than the denoiser looks"
    add("--blend", action="store_true", default=None, help=blend)


def refuse_options(args: argparse.Namespace) -> None:
    """Refuse options of cubes where the input is a picture."""
    for name in OPTIONS:
        if getattr(args, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')} is for cubes of many bands, and {args.input} is a picture")


def run_cube(args: argparse.Namespace, console, prepare_network) -> int:
    """Denoise a cube: check everything, estimate, denoise tile by tile into the output file."""
    import torch

    from pydenoise.hyperspectral import FastHyDe
    from pydenoise.imaging import check_cube_output, create_cube, map_tiles, open_cube, tile_windows

    if args.precision == "int8":
        raise CommandError("--precision int8 is for pictures; a cube's components are calibrated by none")
    if args.noise == "poisson" and args.sigma is not None:
        raise CommandError("--noise poisson: the noise follows from the counts; leave out --sigma")
    cube = open_cube(args.input, bool(args.bands_first))
    check_cube_output(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    denoiser = _denoiser(args, prepare_network)
    overlap = denoiser.radius if args.overlap is None else args.overlap
    tile = _tile(args, denoiser, overlap)
    console.print(f"{args.input}: {cube.describe()}", markup=False)
    moments = _estimate(args, cube, console)
    try:
        model = FastHyDe.fit(moments, args.noise or "non-iid", args.rank, denoiser, args.sigma)
    except ValueError as error:
        raise CommandError(f"{args.input}: {error}") from error
    low, high = model.sigma.min().item(), model.sigma.max().item()
    what = "of the transformed counts" if args.noise == "poisson" else "of the noise"
    console.print(f"{model.rank} components; standard deviation {what} {low:.4g} to {high:.4g}", markup=False)
    windows = tile_windows(*cube.pixels.shape[:2], tile, overlap, denoiser.align)
    with torch.inference_mode(), create_cube(args.output, cube) as out, _progress(console, args.quiet) as progress:
        task = progress.add_task("denoising", total=len(windows))
        map_tiles(
            cube.pixels,
            model,
            tile=tile,
            overlap=overlap,
            align=denoiser.align,
            batch=args.batch or 1,
            blend=bool(args.blend),
            scale=1.0,
            out=out,
            device=args.device,
            dtype=torch.float64 if cube.pixels.dtype.itemsize > 4 else torch.float32,
            on_tile=lambda: progress.advance(task),
        )
    console.print(f"wrote {args.output}", markup=False)
    return 0


def _denoiser(args: argparse.Namespace, prepare_network):
    import torch

    from pydenoise.hyperspectral import FFDNetDenoiser, WaveletDenoiser
    from pydenoise.models import load_ffdnet
    from pydenoise.models.weights import find_ffdnet

    if args.denoiser == "wavelet":
        return WaveletDenoiser()
    model = load_ffdnet(find_ffdnet(args.weights))
    dtype = torch.bfloat16 if args.precision == "bf16" and args.backend == "torch" else torch.float32
    sigma = torch.full((1, 1, 1, 1), 0.1, dtype=dtype, device=args.device)
    return FFDNetDenoiser(model, prepare_network(model, sigma, args.backend, args.precision))


def _tile(args: argparse.Namespace, denoiser, overlap: int) -> int:
    align = denoiser.align
    for name, value in (("tile", args.tile), ("overlap", overlap)):
        if value % align:
            raise CommandError(f"--{name} {value}: with this denoiser, a multiple of {align}")
    if args.tile and args.tile <= 2 * overlap:
        raise CommandError(f"--tile {args.tile} leaves nothing between two margins of --overlap {overlap}")
    return args.tile


def _estimate(args: argparse.Namespace, cube, console):
    """The moments of the cube's bands, with a progress bar."""
    from pydenoise.hyperspectral import moments_of

    with _progress(console, args.quiet) as progress:
        task = progress.add_task("estimating", total=cube.pixels.shape[0] * cube.pixels.shape[1])
        advance = lambda count: progress.advance(task, count)  # noqa: E731
        try:
            return moments_of(cube.pixels, noise=args.noise or "non-iid", device=args.device, on_window=advance)
        except ValueError as error:
            raise CommandError(f"{args.input}: {error}") from error


def _progress(console, quiet: bool):
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    return Progress(*columns, console=console, disable=quiet)
