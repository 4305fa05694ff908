//! What travels, to and from what the use cases take and make.

use latchkey_domain::id::Generation;
use latchkey_domain::run::{Counts, FailureKind, PlanDigests};
use latchkey_proto::v1;
use latchkey_proto::v1::finished::Result as WireResult;
use latchkey_proto::v1::lease_response::Frame as Out;
use prost::Message;
use secrecy::ExposeSecret;

use crate::app::artifacts::{ArtifactHeader, Made, Needed};
use crate::app::finish_job::JobResult;
use crate::app::history::Mark;
use crate::app::parse_digest;
use crate::app::start_job::Go;
use crate::dispatch::{Stop, ToRunner};
use crate::error::Error;
use crate::grpc::convert;
use crate::job::LeaseRef;
use crate::store::record::variable::Category;

/// `None` ends the stream.
pub(super) fn from_dispatch_out(message: ToRunner) -> Option<Out> {
    match message {
        ToRunner::Offer { lease, spec } => Some(Out::Offer(v1::Offer {
            lease: Some(convert::lease_out(lease)),
            job: Some(convert::job_spec(*spec)),
        })),
        ToRunner::Cancel { lease, stop } => Some(cancel_out(lease, stop)),
        ToRunner::Revoke { lease, reason } => {
            Some(Out::Revoke(v1::Revoke { lease: Some(convert::lease_out(lease)), reason }))
        }
        ToRunner::Drain => Some(Out::Drain(v1::Drain {})),
        ToRunner::Resume => Some(Out::Resume(v1::Resume {})),
        // Answered with what is fetched for it.
        ToRunner::Renew { .. } | ToRunner::Superseded => None,
    }
}

pub(super) fn cancel_out(lease: LeaseRef, stop: Stop) -> Out {
    let force = match stop {
        Stop::Gracefully => false,
        Stop::ByForce => true,
    };
    Out::Cancel(v1::CancelJob { lease: Some(convert::lease_out(lease)), force })
}

pub(super) fn go_out(lease: LeaseRef, go: Go, history: Option<Mark>) -> Out {
    let credentials = go.session.map(|session| v1::SessionCredentials {
        access_key_id: session.access_key_id,
        secret_access_key: session.secret_access_key.expose_secret().to_owned(),
        session_token: session
            .session_token
            .map(|token| token.expose_secret().to_owned())
            .unwrap_or_default(),
        expire_time: session.expires_at.map(convert::timestamp),
    });
    let variables = go
        .variables
        .into_iter()
        .map(|variable| v1::JobVariable {
            value: variable.value.expose_secret().to_owned(),
            environment: variable.category == Category::Environment,
            name: variable.name,
            hcl: variable.hcl,
            sensitive: variable.sensitive,
        })
        .collect();
    let lease = Some(convert::lease_out(lease));
    Out::Go(v1::Go { lease, credentials, variables, history: history.map(mark_out) })
}

pub(super) fn mark_out(mark: Mark) -> v1::HistoryMark {
    let Mark { generation, incarnation, history, mac } = mark;
    v1::HistoryMark { generation: generation.get(), incarnation, history, mac }
}

pub(super) fn mark(told: v1::HistoryMark) -> Mark {
    let v1::HistoryMark { generation, incarnation, history, mac } = told;
    Mark { generation: Generation::new(generation), incarnation, history, mac }
}

/// Reads what of a job's needs a runner asks for.
pub(super) fn needed(kind: i32) -> Result<Needed, Error> {
    match v1::ArtifactKind::try_from(kind) {
        Ok(v1::ArtifactKind::Configuration) => Ok(Needed::Configuration),
        Ok(v1::ArtifactKind::Workspace) => Ok(Needed::Workspace),
        Ok(v1::ArtifactKind::State) => Ok(Needed::State),
        Ok(
            v1::ArtifactKind::Unspecified
            | v1::ArtifactKind::Changes
            | v1::ArtifactKind::ErroredState
            | v1::ArtifactKind::StateDump
            | v1::ArtifactKind::Log
            | v1::ArtifactKind::Result,
        )
        | Err(_) => Err(Error::field("kind", "it cannot be fetched")),
    }
}

pub(super) fn artifact_header(header: v1::ArtifactHeader) -> Result<ArtifactHeader, Error> {
    let kind = match v1::ArtifactKind::try_from(header.kind) {
        Ok(v1::ArtifactKind::Workspace) => Made::Workspace,
        Ok(v1::ArtifactKind::State) => Made::State,
        Ok(v1::ArtifactKind::Changes) => Made::Changes,
        Ok(v1::ArtifactKind::ErroredState) => Made::ErroredState,
        Ok(v1::ArtifactKind::StateDump) => Made::StateDump,
        Ok(v1::ArtifactKind::Log) => Made::Log,
        Ok(v1::ArtifactKind::Result) => Made::Result,
        Ok(v1::ArtifactKind::Unspecified | v1::ArtifactKind::Configuration) | Err(_) => {
            return Err(Error::field("kind", "a job makes nothing of this kind"));
        }
    };
    Ok(ArtifactHeader {
        lease: convert::lease(header.lease)?,
        kind,
        digest: parse_digest("digest", &header.digest)?,
        size: header.size,
        sequence: header.sequence,
    })
}

/// Reads the result that an old lease brings as an artifact.
pub(super) fn encoded_result(frame: &[u8]) -> Result<JobResult, Error> {
    let finished = v1::Finished::decode(frame)
        .map_err(|_| Error::field("data", "it is not an encoded Finished frame"))?;
    job_result(finished.result)
}

pub(super) fn job_result(result: Option<WireResult>) -> Result<JobResult, Error> {
    match result.ok_or_else(|| Error::field("result", "say how the job ended"))? {
        WireResult::Plan(plan) => {
            let digests = plan.digests.unwrap_or_default();
            let digests = PlanDigests {
                plan: parse_digest("plan_digest", &digests.plan_digest)?,
                workspace: parse_digest("workspace_digest", &digests.workspace_digest)?,
                lock_file: convert::optional_digest("lock_file_digest", &digests.lock_file_digest)?,
                changes: parse_digest("changes_digest", &digests.changes_digest)?,
            };
            let v1::PlanFinished { applyable, add, change, destroy, import, .. } = plan;
            let version: String = plan.terraform_version.chars().take(64).collect();
            Ok(JobResult::Planned {
                digests,
                applyable,
                counts: Counts { add, change, destroy, import, replace: 0 },
                engine: plan.engine,
                terraform_version: version,
            })
        }
        WireResult::Apply(apply) => {
            let outputs = Some(apply.outputs_json).filter(|outputs| !outputs.is_empty());
            Ok(JobResult::Applied { outputs })
        }
        WireResult::Failed(failed) => {
            let kind = match v1::JobFailure::try_from(failed.kind) {
                Ok(v1::JobFailure::Errored | v1::JobFailure::PlanChanged) => FailureKind::Errored,
                Ok(v1::JobFailure::Canceled) => FailureKind::Canceled,
                Ok(v1::JobFailure::EndedUnknown) => FailureKind::EndedUnknown,
                Ok(v1::JobFailure::StateUndelivered) => FailureKind::StateUndelivered,
                Ok(v1::JobFailure::Unspecified) | Err(_) => {
                    return Err(Error::field("kind", "say how the job failed"));
                }
            };
            Ok(JobResult::Failed { kind, reason: failed.reason })
        }
    }
}

#[cfg(test)]
mod tests {
    use latchkey_proto::v1::Reason;

    use super::*;

    #[test]
    fn a_result_of_an_old_lease_is_the_frame_that_it_would_have_sent() {
        let applied = v1::ApplyFinished { outputs_json: "{}".into() };
        let frame = v1::Finished { result: Some(WireResult::Apply(applied)), ..Default::default() };
        let result = encoded_result(&frame.encode_to_vec()).unwrap();
        assert!(matches!(result, JobResult::Applied { outputs: Some(_) }), "{result:?}");
        for bad in [b"no frame".as_slice(), b""] {
            let error = encoded_result(bad).unwrap_err();
            assert_eq!(error.reason(), Reason::FieldInvalid);
        }
    }
}
