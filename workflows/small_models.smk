# The small models that stand in for large ones where there is no network: `snakemake small_clip` trains again what is shipped.


rule small_clip:
    output:
        model=directory(OUT + "/small_models/small_clip"),
    log:
        OUT + "/logs/small_models/small_clip.log",
    benchmark:
        OUT + "/benchmarks/small_models/small_clip.tsv"
    params:
        # Training goes on from here after an interruption.
        checkpoint=OUT + "/small_models/small_clip.checkpoint",
        options=options(seed=config["seed"]),
        device="cpu" if config["features"]["device"] == "auto" else config["features"]["device"],
    threads: resource("small_clip", "threads")
    resources:
        **needs("small_clip"),
    shell:
        "python -m brainalign.small_models.clip --out {output.model} --checkpoint {params.checkpoint}"
        " --threads {threads} --device {params.device} {params.options} 2> {log}"
