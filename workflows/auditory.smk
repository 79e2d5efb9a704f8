# Recordings of people who listen: decoders of whom they attend to, response functions to what they hear, a section of each.

LISTENING = config.get("listening", {})
DECODERS = LISTENING.get("decoders", {})
LISTENED = [s for s in STUDIES if {"attention", "trf"} & set(STUDIES[s]["analyses"])]


rule listening:
    input:
        lambda w: (
            []
            if STUDIES[w.study]["loader"] in UNFETCHED
            else f"{OUT}/studies/{w.study}/fetched.json"
        ),
    output:
        recording=directory(OUT + "/listening/recordings/{study}/{subject}"),
    log:
        OUT + "/logs/listening/{study}-{subject}.log",
    benchmark:
        OUT + "/benchmarks/listening/{study}-{subject}.tsv"
    wildcard_constraints:
        study="|".join(LISTENED) or "none",
    params:
        loader=lambda w: STUDIES[w.study]["loader"],
        options=lambda w: options(
            data=config["data"],
            parameters=STUDIES[w.study]["parameters"] or None,
            spaces=LISTENING["spaces"],
            rate=LISTENING["rate"],
            seed=config["seed"],
        ),
    threads: resource("listening", "threads")
    resources:
        **needs("listening"),
    shell:
        "brainalign aad-prepare {params.loader} --subject {wildcards.subject} --out {output.recording}"
        " {params.options} 2> {log}"


rule attend:
    input:
        recording=OUT + "/listening/recordings/{study}/{subject}",
        others=lambda w: [
            f"{OUT}/listening/recordings/{w.study}/{other}"
            for other in STUDIES[w.study]["subjects"]
            if DECODERS[w.decoder]["split"] == "subject" and other != w.subject
        ],
    output:
        decoded=OUT + "/listening/decoded/{study}/{subject}/{decoder}.nc",
    log:
        OUT + "/logs/attend/{study}-{subject}-{decoder}.log",
    benchmark:
        OUT + "/benchmarks/attend/{study}-{subject}-{decoder}.tsv"
    wildcard_constraints:
        study="|".join(LISTENED) or "none",
        decoder="|".join(DECODERS) or "none",
    params:
        options=lambda w: options(
            decoder=DECODERS[w.decoder]["kind"],
            settings=DECODERS[w.decoder]["settings"] or None,
            responsive=DECODERS[w.decoder].get("responsive"),
            split=DECODERS[w.decoder]["split"],
            repeated=DECODERS[w.decoder]["repeated"],
            **{k: LISTENING.get(k) for k in ("lengths", "folds")},
            seed=config["seed"],
        ),
        others=lambda w, input: "--others " + shlex.join(input.others) if input.others else "",
    threads: resource("attend", "threads")
    resources:
        **needs("attend"),
    shell:
        "brainalign aad-decode {input.recording} --out {output.decoded} {params.options} {params.others} 2> {log}"


rule listening_section:
    input:
        decoded=lambda w: [
            f"{OUT}/listening/decoded/{w.study}/{subject}/{decoder}.nc"
            for subject in STUDIES[w.study]["subjects"]
            for decoder in DECODERS
        ],
    output:
        section=directory(OUT + "/sections/{study}-attention"),
    log:
        OUT + "/logs/listening_section/{study}.log",
    benchmark:
        OUT + "/benchmarks/listening_section/{study}.tsv"
    wildcard_constraints:
        study="|".join(LISTENED) or "none",
    params:
        options=lambda w: options(
            id=f"{w.study}-attention",
            title=STUDIES[w.study]["title"],
            study=STUDIES[w.study]["loader"],
            decoders={name: decoder["title"] for name, decoder in DECODERS.items()},
            seed=config["seed"],
        ),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign aad-section {input.decoded} --out {output.section} {params.options} 2> {log}"


rule response_functions:
    input:
        recording=OUT + "/listening/recordings/{study}/{subject}",
    output:
        fitted=OUT + "/listening/responses/{study}/{subject}/{space}.nc",
        record=OUT + "/listening/responses/{study}/{subject}/{space}.json",
    log:
        OUT + "/logs/response_functions/{study}-{subject}-{space}.log",
    benchmark:
        OUT + "/benchmarks/response_functions/{study}-{subject}-{space}.tsv"
    wildcard_constraints:
        study="|".join(LISTENED) or "none",
        space="[a-z]+",
    params:
        options=lambda w: options(
            target=w.space,
            **{k: LISTENING["trf"].get(k) for k in ("delays", "split", "folds", "shifts", "alphas")},
            seed=config["seed"],
        ),
    threads: resource("attend", "threads")
    resources:
        **needs("attend"),
    shell:
        "brainalign trf {input.recording} --out {output.fitted} {params.options} > {output.record} 2> {log}"


rule response_section:
    input:
        fitted=lambda w: [
            f"{OUT}/listening/responses/{w.study}/{subject}/{space}.nc"
            for space in LISTENING["trf"]["targets"]
            for subject in STUDIES[w.study]["subjects"]
        ],
    output:
        section=directory(OUT + "/sections/{study}-trf"),
    log:
        OUT + "/logs/response_section/{study}.log",
    benchmark:
        OUT + "/benchmarks/response_section/{study}.tsv"
    wildcard_constraints:
        study="|".join(LISTENED) or "none",
    params:
        options=lambda w: options(
            id=f"{w.study}-trf", title=STUDIES[w.study]["title"], seed=config["seed"]
        ),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign trf-section {input.fitted} --out {output.section} {params.options} 2> {log}"
