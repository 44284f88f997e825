"""The one door to the policies: facts about a call in, decisions with their reasons out.

    engine = PolicyEngine.load(config.policies, checkpoint_facts, handoff_uri=config.handoff.uri)
    engine.campaigns                     tuple[Campaign, ...]         valid ones, ready for calls
    engine.problems                      tuple[CampaignProblem, ...]  refused ones: .name, .reason (never stops the others)
    engine.campaign_for(did)             Campaign | None              .name .shop .persona .greeting .tools .order_digits ...
    engine.admit(facts, num_calls, max_calls)   AdmissionDecision     404 unknown number, 503 + Retry-After full or campaign refused
    engine.style(facts)                  StyleDecision                language, dialect, emotion, rate, instruction, reasons
    engine.system_prompt(facts)          str                          for OpenStream.system_prompt
    engine.disclose(facts)               Disclosure                   .greeting, .notice (protected: heard in full), .reasons
    engine.recording(facts)              RecordingDecision            .mode off | after_notice | always, .reasons
    engine.escalate(facts)               EscalationDecision           none | offer_keypad | transfer | callback_request

`facts` is a `CallFacts`; build a new one when something changes (`msgspec.structs.replace(facts, num_turns_not_understood=2)`)
and ask again: nothing is remembered here. No clock and, after `load`, no I/O. What is decided is stored by the caller.
The transfer target comes from the campaign or from `handoff.uri`, never from the model's text.
"""
