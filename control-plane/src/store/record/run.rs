//! Runs as they are stored.

use std::collections::BTreeSet;

use latchkey_domain::id::{
    AuthenticationId, Digest, EnvironmentId, Epoch, OrganizationId, RunId, RunnerId, UserId,
};
use latchkey_domain::lease::{Engine, Lease, Released, Site};
use latchkey_domain::policy::{
    DestroyedBy, Destroys, Evidence, MfaPolicy, Permit, Phase, PlanFacts,
};
use latchkey_domain::run::{
    Actor, Approval, Authenticated, Counts, Decided, Decision, Given, Job, PlanDigests, Planned,
    RefusedCode, Request, Run, RunKind, RunState,
};
use serde::{Deserialize, Serialize};

use super::environment::{PlanRuleRecord, is_default};
use super::{Millis, Text, variable};

#[derive(Serialize, Deserialize)]
#[serde(remote = "MfaPolicy", rename_all = "snake_case")]
pub(super) enum PolicyRecord {
    Never,
    AppliesOnly,
    PlansAndApplies,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Phase", rename_all = "snake_case")]
pub(super) enum PhaseRecord {
    Plan,
    Apply,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RunKind", rename_all = "snake_case")]
enum KindRecord {
    PlanAndApply,
    PlanOnly,
    Destroy,
    RefreshOnly,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RunState", rename_all = "snake_case")]
enum StateRecord {
    AwaitingPlanMfa,
    Pending,
    PlanQueued,
    Planning,
    AwaitingConfirmation,
    AwaitingApplyMfa,
    ApplyQueued,
    Applying,
    Planned,
    Applied,
    Errored,
    Canceled,
    Discarded,
    Lost,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ActorRecord {
    User { id: Text<UserId>, name: String },
    Service { name: String },
}

#[derive(Debug, Serialize, Deserialize)]
pub struct RunRecord {
    id: Text<RunId>,
    organization: Text<OrganizationId>,
    environment: Text<EnvironmentId>,
    #[serde(with = "KindRecord")]
    kind: RunKind,
    configuration: Text<Digest>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    target: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    replace: Vec<String>,
    auto_apply: bool,
    #[serde(with = "PolicyRecord")]
    policy: MfaPolicy,
    #[serde(default, skip_serializing_if = "is_default")]
    plan_rule: PlanRuleRecord,
    #[serde(default, skip_serializing_if = "is_default")]
    second_person: bool,
    queued_by: ActorRecord,
    queued_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_of: Option<Text<RunId>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    given: Vec<GivenRecord>,
    #[serde(with = "StateRecord")]
    state: RunState,
    updated_at: Millis,
    /// Of runs of before there were limits: when they last moved.
    #[serde(default)]
    entered_at: Option<Millis>,
    plan: JobRecord,
    apply: JobRecord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    site: Option<SiteRecord>,
    planned: Option<PlannedRecord>,
    approval: Option<ApprovalRecord>,
    outputs: Option<String>,
    cancel_requested_by: Option<String>,
    #[serde(default)]
    cancel_requested_at: Option<Millis>,
    #[serde(default)]
    forced_by: Option<String>,
    refused_code: Option<RefusedCodeRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    decision: Option<DecisionRecord>,
    reason: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum GivenRecord {
    Of {
        name: String,
        category: variable::Category,
    },
    /// Of before the category was kept.
    Name(String),
}

impl From<Given> for GivenRecord {
    fn from(given: Given) -> Self {
        let Given { name, category } = given;
        match category {
            Some(category) => GivenRecord::Of { name, category: category.into() },
            None => GivenRecord::Name(name),
        }
    }
}

impl From<GivenRecord> for Given {
    fn from(record: GivenRecord) -> Self {
        match record {
            GivenRecord::Of { name, category } => Given { name, category: Some(category.into()) },
            GivenRecord::Name(name) => Given { name, category: None },
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct DecisionRecord {
    #[serde(with = "DecidedRecord")]
    what: Decided,
    by: String,
    at: Millis,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Decided", rename_all = "snake_case")]
enum DecidedRecord {
    AuthenticatedPlan,
    AuthenticatedApply,
    ApprovedApply,
    Discarded,
    GaveUp,
    Canceled,
    AskedToStop,
    AskedToKill,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct JobRecord {
    epoch: u64,
    lease: Option<LeaseRecord>,
    evidence: Option<EvidenceRecord>,
    authenticated: Option<AuthenticatedRecord>,
    queued_at: Option<Millis>,
    started_at: Option<Millis>,
    ended_at: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log_length: Option<u64>,
    holders: Vec<(u64, Text<RunnerId>)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SiteRecord {
    region: String,
    working_directory: String,
}

impl From<&Site> for SiteRecord {
    fn from(site: &Site) -> Self {
        let Site { region, working_directory } = site.clone();
        Self { region, working_directory }
    }
}

impl From<SiteRecord> for Site {
    fn from(record: SiteRecord) -> Self {
        let SiteRecord { region, working_directory } = record;
        Self { region, working_directory }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct LeaseRecord {
    runner: Text<RunnerId>,
    epoch: u64,
    granted_at: Millis,
    log_base: u64,
    #[serde(default)]
    state: Option<u64>,
    /// Of leases granted before it was kept: any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    engine: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    engine_version: String,
    released_at: Option<Millis>,
    /// The authentication whose session was released; absent for a session without MFA.
    released_authentication: Option<Text<AuthenticationId>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct EvidenceRecord {
    authentication: Text<AuthenticationId>,
    #[serde(with = "PhaseRecord")]
    phase: Phase,
    user: String,
    authenticated_at: Millis,
    expires_at: Millis,
}

#[derive(Debug, Serialize, Deserialize)]
struct AuthenticatedRecord {
    user: String,
    at: Millis,
    expires_at: Millis,
}

#[derive(Debug, Serialize, Deserialize)]
struct PlannedRecord {
    plan: Text<Digest>,
    workspace: Text<Digest>,
    lock_file: Option<Text<Digest>>,
    changes: Text<Digest>,
    digest: Text<Digest>,
    applyable: bool,
    add: u32,
    change: u32,
    destroy: u32,
    import: u32,
    #[serde(default)]
    replace: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    facts: Option<FactsRecord>,
    /// Of plans made before there was a choice: terraform.
    #[serde(default = "terraform")]
    engine: String,
    terraform_version: String,
}

/// [`PlanFacts`] as they are stored.
#[derive(Debug, Serialize, Deserialize)]
struct FactsRecord {
    changes: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    destroys: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    types: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    more_types: bool,
}

impl From<&PlanFacts> for FactsRecord {
    fn from(facts: &PlanFacts) -> Self {
        let PlanFacts { changes, destroys, types, more_types } = facts.clone();
        let (destroys, replaces) = match destroys {
            Some(Destroys { address, by: DestroyedBy::Destroying }) => (Some(address), None),
            Some(Destroys { address, by: DestroyedBy::Replacing }) => (None, Some(address)),
            None => (None, None),
        };
        Self { changes, destroys, replaces, types, more_types }
    }
}

impl From<FactsRecord> for PlanFacts {
    fn from(record: FactsRecord) -> Self {
        let FactsRecord { changes, destroys, replaces, types, more_types } = record;
        let by = |by| move |address| Destroys { address, by };
        let destroys = destroys
            .map(by(DestroyedBy::Destroying))
            .or_else(|| replaces.map(by(DestroyedBy::Replacing)));
        PlanFacts { changes, destroys, types, more_types }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct ApprovalRecord {
    by: String,
    at: Millis,
    digest: Text<Digest>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RefusedCodeRecord {
    authentication: Text<AuthenticationId>,
    reason: String,
    message: String,
    at: Millis,
    aws_request_id: Option<String>,
}

fn terraform() -> String {
    crate::job::TERRAFORM.to_owned()
}

impl From<&Run> for RunRecord {
    fn from(run: &Run) -> Self {
        let Request {
            organization,
            environment,
            kind,
            configuration,
            message,
            target,
            replace,
            auto_apply,
            policy,
            plan_rule,
            second_person,
            queued_by,
            queued_at,
            retry_of,
            given,
        } = run.request.clone();
        Self {
            id: Text(run.id),
            organization: Text(organization),
            environment: Text(environment),
            kind,
            configuration: Text(configuration),
            message,
            target,
            replace,
            auto_apply,
            policy,
            plan_rule: PlanRuleRecord::from(&plan_rule),
            second_person,
            queued_by: match queued_by {
                Actor::User { id, name } => ActorRecord::User { id: Text(id), name },
                Actor::Service { name } => ActorRecord::Service { name },
            },
            queued_at: queued_at.into(),
            retry_of: retry_of.map(Text),
            given: given.into_iter().map(GivenRecord::from).collect(),
            state: run.state,
            updated_at: run.updated_at.into(),
            entered_at: Some(run.entered_at.into()),
            plan: (&run.plan).into(),
            apply: (&run.apply).into(),
            site: run.site.as_ref().map(SiteRecord::from),
            planned: run.planned.as_ref().map(PlannedRecord::from),
            approval: run.approval.as_ref().map(|approval| ApprovalRecord {
                by: approval.by.clone(),
                at: approval.at.into(),
                digest: Text(approval.digest),
            }),
            outputs: run.outputs.clone(),
            cancel_requested_by: run.cancel_requested_by.clone(),
            cancel_requested_at: run.cancel_requested_at.map(Millis::from),
            forced_by: run.forced_by.clone(),
            refused_code: run.refused_code.as_ref().map(|refused| RefusedCodeRecord {
                authentication: Text(refused.authentication),
                reason: refused.reason.clone(),
                message: refused.message.clone(),
                at: refused.at.into(),
                aws_request_id: refused.aws_request_id.clone(),
            }),
            code_reason: run.code_reason.clone(),
            decision: run.decision.as_ref().map(|decision| DecisionRecord {
                what: decision.what,
                by: decision.by.clone(),
                at: decision.at.into(),
            }),
            reason: run.reason.clone(),
        }
    }
}

impl From<RunRecord> for Run {
    fn from(record: RunRecord) -> Self {
        Self {
            id: record.id.0,
            request: Request {
                organization: record.organization.0,
                environment: record.environment.0,
                kind: record.kind,
                configuration: record.configuration.0,
                message: record.message,
                target: record.target,
                replace: record.replace,
                auto_apply: record.auto_apply,
                policy: record.policy,
                plan_rule: record.plan_rule.into(),
                second_person: record.second_person,
                queued_by: match record.queued_by {
                    ActorRecord::User { id, name } => Actor::User { id: id.0, name },
                    ActorRecord::Service { name } => Actor::Service { name },
                },
                queued_at: record.queued_at.into(),
                retry_of: record.retry_of.map(|run| run.0),
                given: record.given.into_iter().map(Given::from).collect(),
            },
            state: record.state,
            updated_at: record.updated_at.into(),
            entered_at: record.entered_at.unwrap_or(record.updated_at).into(),
            plan: record.plan.into(),
            apply: record.apply.into(),
            site: record.site.map(Site::from),
            planned: record.planned.map(Planned::from),
            approval: record.approval.map(|approval| Approval {
                by: approval.by,
                at: approval.at.into(),
                digest: approval.digest.0,
            }),
            outputs: record.outputs,
            cancel_requested_by: record.cancel_requested_by,
            cancel_requested_at: record.cancel_requested_at.map(Into::into),
            forced_by: record.forced_by,
            refused_code: record.refused_code.map(|refused| RefusedCode {
                authentication: refused.authentication.0,
                reason: refused.reason,
                message: refused.message,
                at: refused.at.into(),
                aws_request_id: refused.aws_request_id,
            }),
            code_reason: record.code_reason,
            decision: record.decision.map(|decision| Decision {
                what: decision.what,
                by: decision.by,
                at: decision.at.into(),
            }),
            reason: record.reason,
        }
    }
}

impl From<&Job> for JobRecord {
    fn from(job: &Job) -> Self {
        Self {
            epoch: job.epoch.get(),
            lease: job.lease.as_ref().map(LeaseRecord::from),
            evidence: job.evidence.as_ref().map(|evidence| EvidenceRecord {
                authentication: Text(evidence.authentication),
                phase: evidence.phase,
                user: evidence.user.clone(),
                authenticated_at: evidence.authenticated_at.into(),
                expires_at: evidence.expires_at.into(),
            }),
            authenticated: job.authenticated.as_ref().map(|authenticated| AuthenticatedRecord {
                user: authenticated.user.clone(),
                at: authenticated.at.into(),
                expires_at: authenticated.expires_at.into(),
            }),
            queued_at: job.queued_at.map(Millis::from),
            started_at: job.started_at.map(Millis::from),
            ended_at: job.ended_at.map(Millis::from),
            log_length: job.log_length,
            holders: job
                .holders
                .iter()
                .map(|(epoch, runner)| (epoch.get(), Text(*runner)))
                .collect(),
        }
    }
}

impl From<JobRecord> for Job {
    fn from(record: JobRecord) -> Self {
        Self {
            epoch: Epoch::new(record.epoch),
            lease: record.lease.map(Lease::from),
            evidence: record.evidence.map(|evidence| Evidence {
                authentication: evidence.authentication.0,
                phase: evidence.phase,
                user: evidence.user,
                authenticated_at: evidence.authenticated_at.into(),
                expires_at: evidence.expires_at.into(),
            }),
            authenticated: record.authenticated.map(|authenticated| Authenticated {
                user: authenticated.user,
                at: authenticated.at.into(),
                expires_at: authenticated.expires_at.into(),
            }),
            queued_at: record.queued_at.map(Into::into),
            started_at: record.started_at.map(Into::into),
            ended_at: record.ended_at.map(Into::into),
            log_length: record.log_length,
            holders: record
                .holders
                .into_iter()
                .map(|(epoch, runner)| (Epoch::new(epoch), runner.0))
                .collect(),
        }
    }
}

impl From<&Lease> for LeaseRecord {
    fn from(lease: &Lease) -> Self {
        let authentication = lease.released.and_then(|released| match released.permit {
            Permit::MfaSession { authentication } => Some(Text(authentication)),
            Permit::PlainSession => None,
        });
        Self {
            runner: Text(lease.runner),
            epoch: lease.epoch.get(),
            granted_at: lease.granted_at.into(),
            log_base: lease.log_base,
            state: lease.state,
            engine: lease.engine.name.clone(),
            engine_version: lease.engine.version.clone(),
            released_at: lease.released.map(|released| released.at.into()),
            released_authentication: authentication,
        }
    }
}

impl From<LeaseRecord> for Lease {
    fn from(record: LeaseRecord) -> Self {
        let permit = match record.released_authentication {
            Some(authentication) => Permit::MfaSession { authentication: authentication.0 },
            None => Permit::PlainSession,
        };
        Self {
            runner: record.runner.0,
            epoch: Epoch::new(record.epoch),
            granted_at: record.granted_at.into(),
            log_base: record.log_base,
            state: record.state,
            engine: Engine { name: record.engine, version: record.engine_version },
            released: record.released_at.map(|at| Released { at: at.into(), permit }),
        }
    }
}

impl From<&Planned> for PlannedRecord {
    fn from(planned: &Planned) -> Self {
        let PlanDigests { plan, workspace, lock_file, changes } = planned.digests.clone();
        let Counts { add, change, destroy, import, replace } = planned.counts;
        Self {
            plan: Text(plan),
            workspace: Text(workspace),
            lock_file: lock_file.map(Text),
            changes: Text(changes),
            digest: Text(planned.digest),
            applyable: planned.applyable,
            add,
            change,
            destroy,
            import,
            replace,
            facts: planned.facts.as_ref().map(FactsRecord::from),
            engine: planned.engine.clone(),
            terraform_version: planned.terraform_version.clone(),
        }
    }
}

impl From<PlannedRecord> for Planned {
    fn from(record: PlannedRecord) -> Self {
        Self {
            digests: PlanDigests {
                plan: record.plan.0,
                workspace: record.workspace.0,
                lock_file: record.lock_file.map(|digest| digest.0),
                changes: record.changes.0,
            },
            digest: record.digest.0,
            applyable: record.applyable,
            counts: Counts {
                add: record.add,
                change: record.change,
                destroy: record.destroy,
                import: record.import,
                replace: record.replace,
            },
            facts: record.facts.map(PlanFacts::from),
            engine: record.engine,
            terraform_version: record.terraform_version,
        }
    }
}

#[cfg(test)]
mod tests {
    use latchkey_domain::policy::PlanRule;
    use latchkey_domain::run::Category;

    use super::*;
    use crate::store::record::encode;

    #[test]
    fn a_run_survives_its_record() {
        let id = |n| [n; 16];
        let at = latchkey_domain::time::Timestamp::from_millis(5);
        let digest = Digest::from_bytes([3; 32]);
        let mut run = Run::queue(
            RunId::from_bytes(id(1)),
            Request {
                organization: OrganizationId::from_bytes(id(2)),
                environment: EnvironmentId::from_bytes(id(3)),
                kind: RunKind::Destroy,
                configuration: digest,
                message: "tidy up".into(),
                target: vec!["a.b".into()],
                replace: vec!["c.d".into()],
                auto_apply: true,
                policy: MfaPolicy::PlansAndApplies,
                plan_rule: PlanRule { destructive: true, ..PlanRule::default() },
                second_person: true,
                queued_by: Actor::User { id: UserId::from_bytes(id(4)), name: "ada".into() },
                queued_at: at,
                retry_of: Some(RunId::from_bytes(id(7))),
                given: [None, Some(Category::Terraform), Some(Category::Environment)]
                    .map(|category| Given { name: "size".into(), category })
                    .into(),
            },
        );
        let authentication = AuthenticationId::from_bytes(id(6));
        run.state = RunState::Applying;
        run.apply = Job {
            epoch: Epoch::new(7),
            lease: Some(Lease {
                runner: RunnerId::from_bytes(id(5)),
                epoch: Epoch::new(7),
                granted_at: at,
                log_base: 17,
                state: Some(3),
                engine: Engine { name: "tofu".into(), version: "1.11.4".into() },
                released: Some(Released { at, permit: Permit::MfaSession { authentication } }),
            }),
            evidence: Some(Evidence {
                authentication,
                phase: Phase::Apply,
                user: "ada".into(),
                authenticated_at: at,
                expires_at: at,
            }),
            authenticated: Some(Authenticated { user: "ada".into(), at, expires_at: at }),
            queued_at: Some(at),
            started_at: Some(at),
            ended_at: Some(at),
            log_length: Some(1234),
            holders: vec![(Epoch::new(7), RunnerId::from_bytes(id(5)))],
        };
        run.site = Some(Site { region: "eu-west-1".into(), working_directory: "x/y".into() });
        run.planned = Some(Planned {
            digests: PlanDigests {
                plan: digest,
                workspace: digest,
                lock_file: Some(digest),
                changes: digest,
            },
            digest,
            applyable: true,
            counts: Counts { add: 1, change: 2, destroy: 3, import: 4, replace: 1 },
            facts: Some(PlanFacts {
                changes: 7,
                destroys: Some(Destroys {
                    address: "aws_iam_role.admin".into(),
                    by: DestroyedBy::Replacing,
                }),
                types: ["aws_iam_role".to_owned()].into(),
                more_types: true,
            }),
            engine: "tofu".into(),
            terraform_version: "1.11.4".into(),
        });
        run.approval = Some(Approval { by: "ada".into(), at, digest });
        run.outputs = Some("{}".into());
        run.cancel_requested_by = Some("bob".into());
        run.cancel_requested_at = Some(at);
        run.forced_by = Some("eve".into());
        run.refused_code = Some(RefusedCode {
            authentication,
            reason: "CODE_REJECTED".into(),
            message: "use the next".into(),
            at,
            aws_request_id: Some("x".into()),
        });
        run.code_reason = Some("the plan replaces aws_iam_role.admin".into());
        run.reason = Some("because".into());
        let bytes = encode(&RunRecord::from(&run));
        let back: RunRecord = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(Run::from(back), run);
    }

    #[test]
    fn a_plan_of_before_there_was_a_choice_of_engines_was_terraforms() {
        let old = r#"{"plan":"DD","workspace":"DD","lock_file":null,"changes":"DD","digest":"DD",
            "applyable":true,"add":1,"change":0,"destroy":0,"import":0,
            "terraform_version":"1.11.4"}"#;
        let old = old.replace("DD", &"00".repeat(32));
        let planned: PlannedRecord = serde_json::from_str(&old).unwrap();
        assert_eq!(Planned::from(planned).engine, "terraform");
    }
}
