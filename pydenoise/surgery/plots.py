"""Pictures of an acceleration report; needs matplotlib."""

from pydenoise.surgery.report import AccelerationReport


def plot_snr(report: AccelerationReport, path: str | None = None):
    """See :meth:`AccelerationReport.plot`."""
    measured = [entry for entry in report.layers if entry.snr_db is not None]
    if not measured:
        raise ValueError("report: has no int8 layer whose signal over noise was measured")
    from matplotlib.figure import Figure

    timed = [entry for entry in measured if entry.per_bucket is not None]
    figure = Figure(figsize=(max(8.0, 0.16 * len(measured)), 8.0 if timed else 4.5), layout="constrained")
    axes = figure.subplots(2 if timed else 1, 1, squeeze=False)[:, 0]
    _per_layer(axes[0], measured)
    if timed:
        _per_timestep(figure, axes[1], timed)
    figure.suptitle(f"{report.model}, precision {report.precision}: signal over noise of each int8 layer")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _per_layer(axis, entries: list) -> None:
    schemes = sorted({entry.scheme.split()[0] for entry in entries})
    for index, scheme in enumerate(schemes):
        chosen = [(i, e.snr_db) for i, e in enumerate(entries) if e.scheme.split()[0] == scheme]
        axis.plot(*zip(*chosen, strict=True), "o", color=f"C{index}", label=scheme)
    axis.set_ylabel("SNR [dB]")
    axis.set_xticks(range(len(entries)), [entry.name for entry in entries], rotation=90, fontsize=6)
    axis.grid(alpha=0.3)
    axis.legend()


def _per_timestep(figure, axis, entries: list) -> None:
    rows = [[float("nan") if value is None else value for value in entry.per_bucket] for entry in entries]
    picture = axis.imshow(list(zip(*rows, strict=True)), aspect="auto", origin="lower", cmap="viridis")
    axis.set_ylabel("range of timesteps")
    axis.set_xlabel("layer, in the order of calls")
    figure.colorbar(picture, ax=axis, label="SNR [dB]")
