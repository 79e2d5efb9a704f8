# Brain from features: one job per subject and model, all its layers, cross-validated with the layer chosen inside the training folds.


rule encode:
    input:
        data=OUT + "/studies/{study}/data",
        stimuli=lambda w: stimuli_source(w.study),
        features=OUT + "/features/{study}/{model}.json",
    output:
        encoded=directory(OUT + "/encoding/{study}/{subject}/{model}"),
    log:
        OUT + "/logs/encode/{study}-{subject}-{model}.log",
    benchmark:
        OUT + "/benchmarks/encode/{study}-{subject}-{model}.tsv"
    params:
        folder=lambda w: stimuli_folder(w.study),
        options=lambda w: options(
            seed=config["seed"],
            minimum_ceiling=config["evaluation"]["minimum_ceiling"],
            **config["encoding"],
        ),
    threads: resource("encode", "threads")
    resources:
        mem_mb=resource("encode", "mem_mb"),
        runtime=resource("encode", "runtime"),
        gpu=resource("encode", "gpu"),
    shell:
        "brainalign encode --features {input.features} --stimuli {params.folder}"
        " --responses {input.data}/responses/{wildcards.subject}.zarr"
        " --out {output.encoded} {params.options} --device {config[features][device]} 2> {log}"
