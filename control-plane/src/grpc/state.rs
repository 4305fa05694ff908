//! `StateService`.

use latchkey_proto::v1;
use latchkey_proto::v1::import_state_request::Part;
use latchkey_proto::v1::state_service_server::StateService;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Service, caller, convert, next_part, proof};
use crate::app::open_streams::{Ground, unless_lost};
use crate::app::state_diff::{Action, AttributeChange, StateChange, StateDiff};
use crate::app::states::StateVersionView;
use crate::app::states::push::Sending;
use crate::error::Error;
use crate::store::record::environment::StateOrigin;

#[tonic::async_trait]
impl StateService for Service {
    type ReadStateVersionStream = Answers<v1::ReadStateVersionResponse>;

    async fn list_state_versions(
        &self,
        request: Request<v1::ListStateVersionsRequest>,
    ) -> Result<Response<v1::ListStateVersionsResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListStateVersionsRequest { organization, environment, page_size, page_token } =
            request.into_inner();
        let page = convert::page(page_size, page_token);
        let (page, environment) =
            self.app.list_state_versions(&caller, &organization, &environment, page).await?;
        Ok(Response::new(v1::ListStateVersionsResponse {
            versions: page.items.into_iter().map(version).collect(),
            next_page_token: page.next.unwrap_or_default(),
            lock: environment.hold.state_lock.map(convert::state_lock),
        }))
    }

    async fn get_state_version(
        &self,
        request: Request<v1::GetStateVersionRequest>,
    ) -> Result<Response<v1::GetStateVersionResponse>, Status> {
        let caller = caller(&request)?;
        let v1::GetStateVersionRequest { organization, environment, version: number } =
            request.into_inner();
        let view =
            self.app.show_state_version(&caller, &organization, &environment, number).await?;
        Ok(Response::new(v1::GetStateVersionResponse { version: Some(version(view)) }))
    }

    async fn read_state_version(
        &self,
        request: Request<v1::ReadStateVersionRequest>,
    ) -> Result<Response<Self::ReadStateVersionStream>, Status> {
        let proof = proof(&request)?;
        let v1::ReadStateVersionRequest { organization, environment, version } =
            request.into_inner();
        let caller = &proof.caller;
        let reader =
            self.app.read_state_version(caller, &organization, &environment, version).await?;
        let lost = self.app.hold(&proof, Ground::State { organization, environment }).await?;
        let parts = super::parts(reader, lost, |data| v1::ReadStateVersionResponse { data });
        Ok(Response::new(parts))
    }

    async fn diff_state_versions(
        &self,
        request: Request<v1::DiffStateVersionsRequest>,
    ) -> Result<Response<v1::DiffStateVersionsResponse>, Status> {
        let caller = caller(&request)?;
        let v1::DiffStateVersionsRequest { organization, environment, before, after } =
            request.into_inner();
        let (diff, before, after) = self
            .app
            .diff_state_versions(&caller, &organization, &environment, (before, after))
            .await?;
        Ok(Response::new(v1::DiffStateVersionsResponse {
            diff: Some(diff_out(diff)),
            before: Some(version(before)),
            after: Some(version(after)),
        }))
    }

    async fn rollback_state(
        &self,
        request: Request<v1::RollbackStateRequest>,
    ) -> Result<Response<v1::RollbackStateResponse>, Status> {
        let caller = caller(&request)?;
        let v1::RollbackStateRequest {
            organization,
            environment,
            version: number,
            environment_confirmation: confirmation,
        } = request.into_inner();
        let view = self
            .app
            .rollback_state(&caller, &organization, &environment, number, &confirmation)
            .await?;
        Ok(Response::new(v1::RollbackStateResponse { version: Some(version(view)) }))
    }

    async fn import_state(
        &self,
        request: Request<Streaming<v1::ImportStateRequest>>,
    ) -> Result<Response<v1::ImportStateResponse>, Status> {
        let proof = proof(&request)?;
        let mut parts = request.into_inner();
        let first = next_part(&mut parts).await?.and_then(|first| first.part);
        let Some(Part::Header(v1::ImportStateHeader { organization, environment })) = first else {
            return Err(Error::field("header", "it comes first").into());
        };
        let mut upload =
            self.app.send_state(&proof, &organization, &environment, Sending::Import).await?;
        let lost = self.app.hold(&proof, Ground::State { organization, environment }).await?;
        let taken = async {
            while let Some(data) = data_by(upload.due(), &mut parts).await? {
                upload.write(&data).await?;
            }
            Ok::<_, Status>(upload.finish().await?)
        };
        let view = unless_lost(lost, taken).await?;
        Ok(Response::new(v1::ImportStateResponse { version: Some(version(view)) }))
    }

    async fn force_unlock_state(
        &self,
        request: Request<v1::ForceUnlockStateRequest>,
    ) -> Result<Response<v1::ForceUnlockStateResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ForceUnlockStateRequest { organization, environment, lock_id } =
            request.into_inner();
        self.app.force_unlock_state(&caller, &organization, &environment, &lock_id).await?;
        Ok(Response::new(v1::ForceUnlockStateResponse {}))
    }
}

/// Takes the next data; what has no bytes is none.
async fn data_by(
    due: Instant,
    parts: &mut Streaming<v1::ImportStateRequest>,
) -> Result<Option<Vec<u8>>, Status> {
    let data = async {
        while let Some(message) = parts.message().await? {
            match message.part {
                Some(Part::Data(data)) if data.is_empty() => {}
                Some(Part::Data(data)) => return Ok(Some(data)),
                Some(Part::Header(_)) | None => {
                    return Err(Error::field("data", "after the header, data only").into());
                }
            }
        }
        Ok(None)
    };
    let slow = |_| Status::deadline_exceeded("the state comes too slowly; send it again");
    tokio::time::timeout_at(due, data).await.map_err(slow)?
}

fn version(view: StateVersionView) -> v1::StateVersion {
    let StateVersionView { number, version, is_current } = view;
    let (origin, from_version) = match version.origin {
        StateOrigin::Run => (v1::StateOrigin::Run, 0),
        StateOrigin::Push => (v1::StateOrigin::Push, 0),
        StateOrigin::Import => (v1::StateOrigin::Import, 0),
        StateOrigin::Rollback(from) => (v1::StateOrigin::Rollback, from),
        StateOrigin::Accepted => (v1::StateOrigin::Accepted, 0),
    };
    v1::StateVersion {
        version: number,
        lineage: version.lineage,
        serial: version.serial,
        origin: origin.into(),
        user: version.user,
        run_id: version.run.map(|run| run.0.to_string()).unwrap_or_default(),
        from_version,
        create_time: Some(convert::timestamp(version.at.into())),
        size: version.size.unwrap_or_default(),
        digest: version.digest.0.to_string(),
        current: is_current,
    }
}

pub(super) fn diff_out(diff: StateDiff) -> v1::StateDiff {
    let StateDiff { changes, truncated, added, changed, removed } = diff;
    let changes = changes.into_iter().map(change).collect();
    v1::StateDiff { changes, truncated, added, changed, removed }
}

fn change(change: StateChange) -> v1::StateChange {
    let StateChange { address, action, attributes, truncated } = change;
    let attribute = |attribute: AttributeChange| {
        let AttributeChange { path, before, after, sensitive } = attribute;
        v1::AttributeChange {
            path,
            before_json: before.unwrap_or_default(),
            after_json: after.unwrap_or_default(),
            sensitive,
        }
    };
    v1::StateChange {
        address,
        action: match action {
            Action::Added => v1::StateChangeAction::Added,
            Action::Changed => v1::StateChangeAction::Changed,
            Action::Removed => v1::StateChangeAction::Removed,
        }
        .into(),
        attributes: attributes.into_iter().map(attribute).collect(),
        truncated,
    }
}

#[cfg(test)]
mod tests;
