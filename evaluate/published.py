"""The values of the paper's tables (arXiv 2602.13357), as they were published, by setting and column."""

from evaluate.bench import Setting


def published(columns: str, rows: dict[tuple[str | None, str | None], str]) -> dict[Setting, dict[str, str]]:
    """Rows of values in the order of the columns."""
    names = columns.split(", ")
    return {Setting(*key): dict(zip(names, text.split(), strict=True)) for key, text in rows.items()}


TABLE_1 = published(
    "FID, t-FID, PSNR (dB), SSIM, images/s, hit rate (%), memory (GB), latency (ms)",
    {
        (None, None): "4.42 12.11 25.8 .915 11.6 0 18.3 1012",
        ("teacache", None): "5.09 14.72 23.7 .891 15.9 68.5 12.7 702",
        ("teacache", ""): "4.54 13.22 25.1 .907 15.7 77.9 12.8 714",
        ("adacache", None): "4.75 13.55 24.7 .900 15.0 72.4 14.8 768",
        ("adacache", ""): "4.43 13.02 25.3 .911 14.8 78.1 14.9 770",
        ("lazydit", None): "4.91 14.66 23.5 .892 16.2 64.0 13.8 720",
        ("lazydit", ""): "4.55 13.15 25.1 .908 15.8 75.2 13.9 731",
        ("first_block", None): "4.48 13.22 25.1 .908 14.9 78.6 11.5 745",
        ("first_block", ""): "4.38 12.85 25.5 .913 14.7 82.1 11.6 748",
        ("fastcache", None): "4.46 13.15 25.0 .906 15.6 80.5 11.2 750",
        ("fastcache", ""): "4.37 12.78 25.6 .915 15.5 83.5 10.9 732",
    },
)
TABLE_2 = published("FID", {("fastcache", None): "5.89", ("fastcache", ""): "5.62"})
TABLE_3 = published(
    "FID, images/s, hit rate (%)",
    {("fastcache", ""): "4.37 15.7 83.5", ("teacache", ""): "4.49 15.6 79.7", ("first_block", ""): "4.48 15.5 78.9"},
)
TABLE_4 = published(  # the values at gamma = lambda = 1 are those of FastCache in Table I
    "FID, hit rate (%)",
    {
        ("fastcache", "gamma=0.5"): "4.56 75.2",
        ("fastcache", ""): "4.37 83.5",
        ("fastcache", "gamma=2"): "4.65 81.2",
        ("fastcache", "lambda=0.5"): "4.50 72.3",
        ("fastcache", "lambda=2"): "4.62 79.9",
    },
)
PUBLISHED = {"table1": (256, TABLE_1), "table2": (512, TABLE_2), "table3": (256, TABLE_3), "table4": (256, TABLE_4)}
OTHER_MODELS = (
    "Published FID of other models, before and after correction: DiT-B/2 on FFHQ-256 6.13 and 5.97, DiT-L/2 on "
    "LSUN-Church-256 5.72 and 5.55, whose weights were not released. Not in this code base: PixArt-alpha on "
    "ImageNet-256 7.20 and 6.85, SGDiff on COCO-512 8.65 and 8.10, Stable Diffusion on FFHQ-1024 9.11 and 8.72."
)
