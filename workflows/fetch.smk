# Sources from outside: studies and models. Each writes whether it could be had, and why not.


checkpoint fetch:
    output:
        status=OUT + "/studies/{study}/fetched.json",
    log:
        OUT + "/logs/fetch/{study}.log",
    benchmark:
        OUT + "/benchmarks/fetch/{study}.tsv"
    params:
        # Of a simulated listener, the sounds.
        loader=lambda w: STUDIES[w.study]["parameters"].get("sounds", STUDIES[w.study]["loader"]),
        options=lambda w: options(
            data=config["data"],
            mirror=os.environ.get("BRAINALIGN_MIRROR"),
            optional=STUDIES[w.study]["optional"],
            accept_terms=config["accept_terms"],
        ),
    threads: resource("fetch", "threads")
    resources:
        **needs("fetch"),
    shell:
        "brainalign fetch {params.loader} --status {output.status} {params.options} 2> {log}"


checkpoint model:
    output:
        card=OUT + "/models/{model}.json",
    log:
        OUT + "/logs/model/{model}.log",
    benchmark:
        OUT + "/benchmarks/model/{model}.tsv"
    params:
        model=lambda w: model_options(w.model),
        options=lambda w: options(
            select=MODELS[w.model]["layers"], optional=MODELS[w.model]["optional"]
        ),
        folders=[os.environ.get(k) for k in ("BRAINALIGN_WEIGHTS", "BRAINALIGN_MIRROR")],
    threads: resource("model", "threads")
    resources:
        **needs("model"),
    shell:
        "brainalign layers {params.model} --out {output.card} {params.options} 2> {log}"
