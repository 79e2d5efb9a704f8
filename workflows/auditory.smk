# Who is listened to: recordings of people who attend one of several talkers, decoders of attention, a section of each study.

LISTENING = config.get("listening", {})
DECODERS = LISTENING.get("decoders", {})
LISTENED = [s for s in STUDIES if "attention" in STUDIES[s]["analyses"]]


rule listening:
    input:
        OUT + "/studies/{study}/fetched.json",
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
            **{k: LISTENING.get(k) for k in ("lengths", "folds", "repeated")},
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
