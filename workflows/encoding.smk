# Brain from features: one job per subject and model, all its layers, cross-validated with the layer chosen inside the training
# folds; with `encoding.parts` above 1 a job for each part of the neuroids, and one that gathers them.


# Not among the params: another device is no reason to run again.
ENCODE_DEVICE = config["encoding"].get("device", config["features"]["device"])


def encode_options(wildcards, **more):
    settings = {k: v for k, v in config["encoding"].items() if k not in ("parts", "joint", "clusters", "device")}
    study = STUDIES[wildcards.study]
    settings |= {k: study.get(k) for k in ("delays", "direction")}
    if settings["delays"] and not isinstance(settings["inner"], int):
        settings["inner"] = 5
    if clustered(wildcards.study):
        manifest = f"{OUT}/features/{wildcards.study}/{CLUSTERS['model']}.json"
        settings |= {"clusters": CLUSTERS["n"], "embedding": [manifest, CLUSTERS["layer"]]}
    if wildcards.model in JOINT:
        settings |= {k: v for k, v in JOINT[wildcards.model].items() if k != "title"}
    return options(
        seed=config["seed"],
        minimum_ceiling=config["evaluation"]["minimum_ceiling"],
        **(settings | more),
    )


if config["encoding"]["parts"] == 1:

    rule encode:
        input:
            **encode_inputs(),
        output:
            encoded=directory(OUT + "/encoding/{study}/{subject}/{model}"),
        log:
            OUT + "/logs/encode/{study}-{subject}-{model}.log",
        benchmark:
            OUT + "/benchmarks/encode/{study}-{subject}-{model}.tsv"
        params:
            folder=lambda w: stimuli_folder(w.study),
            options=lambda w: encode_options(w),
        threads: resource("encode", "threads")
        resources:
            **needs("encode"),
        shell:
            "brainalign encode --features {input.features} --stimuli {params.folder}"
            " --responses {input.data}/responses/{wildcards.subject}.zarr"
            " --out {output.encoded} {params.options} --memory-mb {resources.mem_mb}"
            " --device {ENCODE_DEVICE} 2> {log}"

else:

    rule encode_part:
        input:
            **encode_inputs(),
        output:
            encoded=temp(directory(OUT + "/encoding-parts/{study}/{subject}/{model}/{part}")),
        log:
            OUT + "/logs/encode/{study}-{subject}-{model}-{part}.log",
        benchmark:
            OUT + "/benchmarks/encode/{study}-{subject}-{model}-{part}.tsv"
        params:
            folder=lambda w: stimuli_folder(w.study),
            options=lambda w: encode_options(w, part=f"{w.part}/{config['encoding']['parts']}"),
        threads: resource("encode", "threads")
        resources:
            **needs("encode"),
        shell:
            "brainalign encode --features {input.features} --stimuli {params.folder}"
            " --responses {input.data}/responses/{wildcards.subject}.zarr"
            " --out {output.encoded} {params.options} --memory-mb {resources.mem_mb}"
            " --device {ENCODE_DEVICE} 2> {log}"

    rule gather:
        input:
            **encode_inputs(),
            parts=expand(
                OUT + "/encoding-parts/{{study}}/{{subject}}/{{model}}/{part}",
                part=range(1, config["encoding"]["parts"] + 1),
            ),
        output:
            encoded=directory(OUT + "/encoding/{study}/{subject}/{model}"),
        log:
            OUT + "/logs/gather/{study}-{subject}-{model}.log",
        benchmark:
            OUT + "/benchmarks/gather/{study}-{subject}-{model}.tsv"
        threads: resource("gather", "threads")
        resources:
            **needs("gather"),
        shell:
            "brainalign gather {input.parts} --out {output.encoded}"
            " --inputs {input.features} {input.data}/responses/{wildcards.subject}.zarr 2> {log}"
