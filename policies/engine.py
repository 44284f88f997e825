"""The one door to the policies: facts about a call in, decisions with their reasons out.

    engine = PolicyEngine.load(config.policies, checkpoint_facts, handoff_uri=config.handoff.uri,
                               recording=config.storage.recording_policy, line_keys=frozenset(lines))
    engine.campaigns            valid ones, ready for calls
    engine.problems             refused ones: .name, .reason (they never stop the others)
    engine.campaign_for(did)    Campaign | None: .name .shop .persona .lines .tools .order_digits ...
    engine.admit(facts, num_calls, max_calls)   404 unknown number; 503 + Retry-After: full, or its campaign is refused
    engine.style(facts)         StyleDecision: language, dialect, emotion, rate, instruction, reasons
    engine.duplex(facts)        DuplexDecision: preset and values that go over the operator's [turn_taking]
    engine.system_prompt(facts) for OpenStream.system_prompt
    engine.claims(facts)        what the campaign reads of the call's headers, by variable: the caller's claims
    engine.disclose(facts)      Disclosure: .line is the key of the protected sentence, to be heard in full
    engine.is_notice_early(facts)   is that sentence said before the answer?
    engine.recording(facts)     RecordingDecision: .mode off | after_notice | always
    engine.escalate(facts)      EscalationDecision: none | offer_keypad | transfer | callback_request
    engine.outbound(campaign, number, uri)      OutboundDecision: may it call there, by which trunks, as whom
    engine.answered(facts, kind)                AnswerDecision: what to do when a voicemail, a menu ... has answered

`facts` is a `CallFacts`; build a new one when something changes (`msgspec.structs.replace(facts,
num_turns_not_understood=2)`) and ask again: nothing is remembered here. No clock and, after `load`, no I/O. What is
decided is stored by the caller. The transfer target comes from the campaign or from `handoff.uri`, never from the
model's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from policies.caller_claims import claims_of, claims_sentence, named_headers
from policies.campaign import Campaign, CampaignProblem, load_campaigns
from policies.config import PoliciesConfig
from policies.consent import RecordingDecision, decide_recording
from policies.decisions import (
    AdmissionDecision,
    AnswerDecision,
    DuplexDecision,
    EscalationDecision,
    OutboundDecision,
    StyleDecision,
)
from policies.disclosure import Disclosure, disclose
from policies.duplex_manner import decide_duplex
from policies.escalation import decide_escalation
from policies.facts import CallFacts, CheckpointFacts
from policies.outbound import decide_answer, decide_outbound
from policies.speaking_style import decide_style

SHIPPED_CAMPAIGNS = Path(__file__).parent / "campaigns"


class UnknownNumber(LookupError):
    """A policy was asked about a number that no valid campaign answers; `admit` refuses such a call first."""


@dataclass(frozen=True)
class PolicyEngine:
    config: PoliciesConfig
    campaigns: tuple[Campaign, ...]
    problems: tuple[CampaignProblem, ...] = ()
    handoff_uri: str = ""
    handoff_manner: str = "blind"
    most_recording: str = "after_notice"

    @classmethod
    def load(
        cls,
        config: PoliciesConfig,
        checkpoint: CheckpointFacts,
        *,
        handoff_uri: str = "",
        handoff_manner: str = "blind",
        recording: str = "after_notice",
        line_keys: frozenset[str] = frozenset(),
    ) -> PolicyEngine:
        """`recording` is the most that may be recorded; `line_keys` are the fixed sentences a campaign may put in its
        words.
        """
        folder = Path(config.campaigns_dir) if config.campaigns_dir else SHIPPED_CAMPAIGNS
        if not folder.is_dir():
            raise ValueError(f"policies.campaigns_dir = {config.campaigns_dir!r}: must be a folder")
        campaigns, problems = load_campaigns(folder, checkpoint, line_keys)
        names = {campaign.name for campaign in campaigns} | {problem.name for problem in problems}
        if config.default_campaign and config.default_campaign not in names:
            raise ValueError(
                f"policies.default_campaign = {config.default_campaign!r}: must be one of {', '.join(sorted(names))}"
            )
        return cls(config, campaigns, problems, handoff_uri, handoff_manner, recording)

    def campaign_for(self, did: str) -> Campaign | None:
        by_number = next((c for c in self.campaigns if did in c.dids), None)
        if by_number or self._refused(did):
            return by_number  # a refused campaign's number must not fall through to the default one
        return next((c for c in self.campaigns if c.name == self.config.default_campaign), None)

    def admit(self, facts: CallFacts, num_calls: int, max_calls: int) -> AdmissionDecision:
        """`num_calls` = calls in progress without this one."""
        campaign = self.campaign_for(facts.did)
        if campaign is None and (problem := self._refused(facts.did) or self._refused_default()):
            reason = f"campaign {problem.name} is refused: {problem.reason}"
            return AdmissionDecision(
                is_admitted=False, sip_status=503, retry_after_s=self.config.retry_after_s, reasons=(reason,)
            )
        if campaign is None:
            return AdmissionDecision(is_admitted=False, sip_status=404, reasons=(f"no campaign answers {facts.did}",))
        if num_calls >= max_calls:
            reason = f"{num_calls} of {max_calls} calls in progress"
            return AdmissionDecision(
                is_admitted=False, sip_status=503, retry_after_s=self.config.retry_after_s, reasons=(reason,)
            )
        return AdmissionDecision(is_admitted=True, reasons=(f"campaign {campaign.name}",))

    def style(self, facts: CallFacts) -> StyleDecision:
        return decide_style(self._campaign(facts).style, facts)

    def duplex(self, facts: CallFacts) -> DuplexDecision:
        return decide_duplex(self._campaign(facts).duplex)

    def system_prompt(self, facts: CallFacts) -> str:
        """Persona, style instruction and what the line expects, in the text form the checkpoint was trained on."""
        campaign = self._campaign(facts)
        sentences = [campaign.persona.introduction(campaign.shop), self.style(facts).instruction]
        if campaign.order_digits:
            sentences.append(f"order numbers have {campaign.order_digits} digits.")
        sentences.append(claims_sentence(self.claims(facts)))  # last: what calls share comes first
        return " ".join(filter(None, sentences))

    def claims(self, facts: CallFacts) -> dict[str, str]:
        return claims_of(self._campaign(facts).caller, facts.headers)

    def named_headers(self, facts: CallFacts) -> dict[str, str]:
        return named_headers(self._campaign(facts).caller, facts.headers)

    def is_notice_early(self, facts: CallFacts) -> bool:
        """Said before the answer, as early media."""
        return facts.direction == "inbound" and self._campaign(facts).early_media == "notice"

    def recording(self, facts: CallFacts) -> RecordingDecision:
        return decide_recording(self._campaign(facts).recording, self.most_recording)

    def disclose(self, facts: CallFacts) -> Disclosure:
        return disclose(self.recording(facts))

    def escalate(self, facts: CallFacts) -> EscalationDecision:
        campaign = self._campaign(facts)
        uri = campaign.handoff_uri or self.handoff_uri
        is_warm = (campaign.handoff_manner or self.handoff_manner) == "warm"
        return decide_escalation(facts, self.config, uri, is_warm, campaign.order_digits > 0)

    def outbound(self, campaign: Campaign, number: str, uri: str) -> OutboundDecision:
        return decide_outbound(campaign.outbound, number, uri)

    def answered(self, facts: CallFacts, kind: str) -> AnswerDecision:
        return decide_answer(self._campaign(facts).outbound, kind)

    def campaign_named(self, name: str) -> Campaign | None:
        """A valid one."""
        return next((campaign for campaign in self.campaigns if campaign.name == name), None)

    def _campaign(self, facts: CallFacts) -> Campaign:
        campaign = self.campaign_for(facts.did)
        if campaign is None:
            raise UnknownNumber(facts.did)
        return campaign

    def _refused(self, did: str) -> CampaignProblem | None:
        """The refused campaign that lists this number, unless a valid one lists it too."""
        if any(did in campaign.dids for campaign in self.campaigns):
            return None
        return next((p for p in self.problems if did in p.dids), None)

    def _refused_default(self) -> CampaignProblem | None:
        return next((p for p in self.problems if p.name == self.config.default_campaign), None)
