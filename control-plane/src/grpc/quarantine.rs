//! `QuarantineService`.

use latchkey_domain::id::QuarantinedId;
use latchkey_proto::v1;
use latchkey_proto::v1::quarantine_service_server::QuarantineService;
use tonic::{Request, Response, Status};

use super::{Answers, Service, caller, convert, proof, state};
use crate::app::open_streams::Ground;
use crate::app::parse_run_id;
use crate::app::quarantine::{QuarantinedView, Settlement};
use crate::error::Error;
use crate::store::record::quarantine::Kind;

#[tonic::async_trait]
impl QuarantineService for Service {
    type ReadQuarantinedStream = Answers<v1::ReadQuarantinedResponse>;

    async fn list_quarantined(
        &self,
        request: Request<v1::ListQuarantinedRequest>,
    ) -> Result<Response<v1::ListQuarantinedResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListQuarantinedRequest { organization, run_id, page_size, page_token } =
            request.into_inner();
        let run = if run_id.is_empty() { None } else { Some(parse_run_id(&run_id)?) };
        let page = convert::page(page_size, page_token);
        let page = self.app.list_quarantined(&caller, &organization, run, page).await?;
        Ok(Response::new(v1::ListQuarantinedResponse {
            quarantined: page.items.into_iter().map(out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn read_quarantined(
        &self,
        request: Request<v1::ReadQuarantinedRequest>,
    ) -> Result<Response<Self::ReadQuarantinedStream>, Status> {
        let proof = proof(&request)?;
        let v1::ReadQuarantinedRequest { organization, quarantined_id } = request.into_inner();
        let id = parse_id(&quarantined_id)?;
        let reader = self.app.read_quarantined(&proof.caller, &organization, id).await?;
        let lost = self.app.hold(&proof, Ground::Organization(organization)).await?;
        let parts = super::parts(reader, lost, |data| v1::ReadQuarantinedResponse { data });
        Ok(Response::new(parts))
    }

    async fn compare_quarantined(
        &self,
        request: Request<v1::CompareQuarantinedRequest>,
    ) -> Result<Response<v1::CompareQuarantinedResponse>, Status> {
        let caller = caller(&request)?;
        let v1::CompareQuarantinedRequest { organization, quarantined_id } = request.into_inner();
        let id = parse_id(&quarantined_id)?;
        let diff = self.app.compare_quarantined(&caller, &organization, id).await?;
        Ok(Response::new(v1::CompareQuarantinedResponse { diff: Some(state::diff_out(diff)) }))
    }

    async fn accept_state(
        &self,
        request: Request<v1::AcceptStateRequest>,
    ) -> Result<Response<v1::AcceptStateResponse>, Status> {
        let caller = caller(&request)?;
        let v1::AcceptStateRequest {
            organization,
            quarantined_id,
            environment_confirmation,
            older,
        } = request.into_inner();
        let id = parse_id(&quarantined_id)?;
        let state = self
            .app
            .accept_state(&caller, &organization, id, &environment_confirmation, older)
            .await?;
        Ok(Response::new(v1::AcceptStateResponse {
            state_lineage: state.lineage,
            state_serial: state.serial,
        }))
    }

    async fn drop_quarantined(
        &self,
        request: Request<v1::DropQuarantinedRequest>,
    ) -> Result<Response<v1::DropQuarantinedResponse>, Status> {
        let caller = caller(&request)?;
        let v1::DropQuarantinedRequest { organization, quarantined_id } = request.into_inner();
        let id = parse_id(&quarantined_id)?;
        self.app.drop_quarantined(&caller, &organization, id).await?;
        Ok(Response::new(v1::DropQuarantinedResponse {}))
    }

    async fn settle_quarantine(
        &self,
        request: Request<v1::SettleQuarantineRequest>,
    ) -> Result<Response<v1::SettleQuarantineResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let settlement = match request.settlement() {
            v1::Settlement::Accept => Settlement::Accept { older: request.older },
            v1::Settlement::Drop => Settlement::Drop,
            v1::Settlement::Unspecified => {
                let message = "say whether a state is accepted or all is dropped";
                return Err(Error::field("settlement", message).into());
            }
        };
        let run = parse_run_id(&request.run_id)?;
        let confirmation = &request.environment_confirmation;
        let settled = self
            .app
            .settle_quarantine(&caller, &request.organization, run, confirmation, settlement)
            .await?;
        let state = settled.state.unwrap_or_default();
        Ok(Response::new(v1::SettleQuarantineResponse {
            state_lineage: state.lineage,
            state_serial: state.serial,
            dropped: settled.dropped,
            unfrozen: settled.unfrozen,
        }))
    }
}

fn parse_id(text: &str) -> Result<QuarantinedId, Error> {
    text.parse().map_err(|_| Error::field("quarantined_id", "it is not an id (a UUID)"))
}

fn out(view: QuarantinedView) -> v1::Quarantined {
    let QuarantinedView { record, summary } = view;
    let state = record.state.unwrap_or_default();
    v1::Quarantined {
        quarantined_id: record.id.0.to_string(),
        run_id: record.run.0.to_string(),
        phase: convert::phase_out(record.phase).into(),
        epoch: record.epoch,
        generation: record.generation,
        kind: kind_out(record.kind).into(),
        digest: record.digest.0.to_string(),
        size: record.size,
        runner_id: record.runner.0.to_string(),
        create_time: Some(convert::timestamp(record.at.into())),
        lineage: state.lineage,
        serial: state.serial,
        summary,
    }
}

const fn kind_out(kind: Kind) -> v1::QuarantinedKind {
    match kind {
        Kind::State => v1::QuarantinedKind::State,
        Kind::ErroredState => v1::QuarantinedKind::ErroredState,
        Kind::StateDump => v1::QuarantinedKind::StateDump,
        Kind::Workspace => v1::QuarantinedKind::Workspace,
        Kind::Changes => v1::QuarantinedKind::Changes,
        Kind::Log => v1::QuarantinedKind::Log,
        Kind::Result => v1::QuarantinedKind::Result,
    }
}
