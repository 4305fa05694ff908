//! `AuditService`.

use latchkey_domain::id::Digest;
use latchkey_proto::v1;
use latchkey_proto::v1::audit_service_server::AuditService;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert};
use crate::app::audit_trail::ChainState;
use crate::audit::Record;

#[tonic::async_trait]
impl AuditService for Service {
    async fn list_audit_records(
        &self,
        request: Request<v1::ListAuditRecordsRequest>,
    ) -> Result<Response<v1::ListAuditRecordsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let page = convert::page(request.page_size, request.page_token);
        let page =
            self.app.list_audit(&caller, &request.organization, &request.run_id, page).await?;
        Ok(Response::new(v1::ListAuditRecordsResponse {
            records: page.items.into_iter().map(out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
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
    v1::AuditRecord {
        sequence: record.sequence,
        time: Some(convert::timestamp(record.draft.at)),
        actor: record.draft.actor,
        action: record.draft.action,
        subject: record.draft.subject,
        details_json: serde_json::Value::Object(record.draft.details).to_string(),
        digest: Digest::from_bytes(record.digest).to_string(),
    }
}
