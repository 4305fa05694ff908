//! `AuditService`.

use std::sync::Arc;

use latchkey_domain::id::Digest;
use latchkey_proto::v1;
use latchkey_proto::v1::audit_service_server::AuditService;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::revocable::until_lost;
use super::{Answers, Service, caller, convert, proof};
use crate::app::audit_trail::{AuditFilter, ChainState};
use crate::app::open_streams::Ground;
use crate::audit::Record;

#[tonic::async_trait]
impl AuditService for Service {
    type ExportAuditStream = Answers<v1::ExportAuditResponse>;

    async fn list_audit_records(
        &self,
        request: Request<v1::ListAuditRecordsRequest>,
    ) -> Result<Response<v1::ListAuditRecordsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let page = convert::page(request.page_size, request.page_token);
        let filter = AuditFilter {
            run_id: request.run_id,
            actor: request.actor,
            action: request.action,
            subject_prefix: request.subject_prefix,
            environment: request.environment,
            from: convert::time("from_time", request.from_time)?,
            until: convert::time("until_time", request.until_time)?,
        };
        let page = self.app.list_audit(&caller, &request.organization, filter, page).await?;
        Ok(Response::new(v1::ListAuditRecordsResponse {
            records: page.items.into_iter().map(out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn export_audit(
        &self,
        request: Request<v1::ExportAuditRequest>,
    ) -> Result<Response<Self::ExportAuditStream>, Status> {
        let proof = proof(&request)?;
        let v1::ExportAuditRequest { organization, from_sequence } = request.into_inner();
        let mut export = self.app.export_audit(&proof.caller, &organization, from_sequence).await?;
        let lost = self.app.hold(&proof, Ground::Organization(organization)).await?;
        let app = Arc::clone(&self.app);
        let (sender, parts) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let part = match app.read_export(&mut export).await {
                    Ok(records) if records.is_empty() => return,
                    Ok(records) => Ok(v1::ExportAuditResponse {
                        records: records.into_iter().map(out).collect(),
                    }),
                    Err(error) => Err(Status::from(error)),
                };
                let failed = part.is_err();
                if sender.send(part).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(until_lost(lost, ReceiverStream::new(parts))))
    }

    async fn verify_audit(
        &self,
        request: Request<v1::VerifyAuditRequest>,
    ) -> Result<Response<v1::VerifyAuditResponse>, Status> {
        let caller = caller(&request)?;
        let state = self.app.verify_audit(&caller, &request.into_inner().organization).await?;
        Ok(Response::new(match state {
            ChainState::Intact { records, head } => v1::VerifyAuditResponse {
                intact: true,
                records,
                head_digest: Digest::from_bytes(head).to_string(),
                ..Default::default()
            },
            ChainState::Broken { at, problem } => {
                v1::VerifyAuditResponse { broken_at: at, problem, ..Default::default() }
            }
        }))
    }
}

fn out(record: Record) -> v1::AuditRecord {
    let details_json = record.draft.details_json();
    v1::AuditRecord {
        sequence: record.sequence,
        time: Some(convert::timestamp(record.draft.at)),
        actor: record.draft.actor,
        action: record.draft.action,
        subject: record.draft.subject,
        details_json,
        digest: Digest::from_bytes(record.digest).to_string(),
        previous_digest: Digest::from_bytes(record.previous).to_string(),
        organization_id: record.draft.organization.to_string(),
    }
}
