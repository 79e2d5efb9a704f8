# What a model computes for a study's stimuli. The features themselves lie in a store keyed by content, so that nothing is computed
# twice; a rule's output is the list of the stores, one a layer.


rule features:
    input:
        # A network of the attention sweep is what it was trained to be; others may be left out.
        card=lambda w: SWEEP[w.model]["folder"] if w.model in SWEEP else f"{OUT}/models/{w.model}.json",
        stimuli=lambda w: stimuli_source(w.study),
    output:
        OUT + "/features/{study}/{model}.json",
    log:
        OUT + "/logs/features/{study}-{model}.log",
    benchmark:
        OUT + "/benchmarks/features/{study}-{model}.tsv"
    params:
        model=lambda w: model_options(w.model),
        folder=lambda w: stimuli_folder(w.study),
        store=OUT + "/features/store",
        options=lambda w: options(
            layers=MODELS[w.model]["layers"],
            pooling=MODELS[w.model]["pooling"],
            attention=MODELS[w.model].get("attention"),
            autocast=config["features"]["autocast"],
        ),
    threads: resource("features", "threads")
    resources:
        **needs("features"),
    shell:
        "brainalign features {params.model} --stimuli {params.folder} --store {params.store}"
        " --out {output} {params.options}"
        # How it is computed, not what: in no params, so that a change computes nothing again.
        " --batch-size {config[features][batch_size]} --workers {threads}"
        " --device {config[features][device]} 2> {log}"
