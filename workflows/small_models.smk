# The small models that stand in for large ones where there is no network: `snakemake small_models` trains all of them from nothing, to
# models of the kind that is shipped. The shipped small_clip and small_diffusion were trained on from earlier weights (--start), as
# their cards say, so theirs are not these weights. Each trainer goes on from its checkpoint after an interruption.

SMALL = OUT + "/small_models"
SMALL_DEVICE = "cpu" if config["features"]["device"] == "auto" else config["features"]["device"]

# Name -> module of its trainer, and options of its own.
TRAINERS = {
    "small_clip": (
        "clip",
        {
            "seed": config["seed"],
            "steady_steps": 4800,
            "steady_radius": 5,
            "steady_faint": 0.3,
            "steady_grey": 0.12,
        },
    ),
    "small_judge": (
        "clip",
        {"tower": "convnet", "seed": config["seed"] + 7, "scenes": 8000, "steps": 3000, "steady_steps": 1500},
    ),
    "small_classifier": ("classifier", {"seed": config["seed"] + 13}),
    "small_captioner": ("captioner", {"seed": config["seed"] + 1}),
    "small_diffusion": ("diffusion", {"seed": config["seed"], "decoder_steps": 5000}),
}
# These read the small CLIP model: its text tower, or its embeddings.
BUILT_ON_CLIP = ("small_captioner", "small_diffusion")


rule small_models:
    input:
        expand(SMALL + "/{name}", name=TRAINERS),


rule small_model:
    input:
        clip=lambda w: f"{SMALL}/small_clip" if w.name in BUILT_ON_CLIP else [],
        judge=lambda w: f"{SMALL}/small_classifier" if w.name == "small_diffusion" else [],
    output:
        model=directory(SMALL + "/{name}"),
    log:
        OUT + "/logs/small_models/{name}.log",
    benchmark:
        OUT + "/benchmarks/small_models/{name}.tsv"
    wildcard_constraints:
        name="|".join(TRAINERS),
    params:
        module=lambda w: TRAINERS[w.name][0],
        checkpoint=SMALL + "/{name}.checkpoint",
        options=lambda w, input: options(
            **TRAINERS[w.name][1], clip=input.get("clip") or None, judge=input.get("judge") or None
        ),
        device=SMALL_DEVICE,
    threads: resource("small_models", "threads")
    resources:
        **needs("small_models"),
    shell:
        "python -m brainalign.small_models.{params.module} --out {output.model}"
        " --checkpoint {params.checkpoint} --threads {threads} --device {params.device}"
        " {params.options} 2> {log}"
