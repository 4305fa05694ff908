//! `audit`: the chained record of who did what.

use clap::Subcommand;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::account::{AuditListView, AuditRecordView, VerificationView};

#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Lists the records, oldest first; owners only
    List {
        /// Only records about this run
        #[arg(long)]
        run: Option<String>,
    },
    /// Walks the whole chain; fails when it is broken; owners only
    Verify,
}

impl Audit {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            Audit::List { run } => {
                let mut request = v1::ListAuditRecordsRequest {
                    organization,
                    page_size: 200,
                    page_token: String::new(),
                    run_id: run.unwrap_or_default(),
                };
                let mut records = Vec::new();
                loop {
                    let page = client
                        .call(|| {
                            let (mut service, request) = (client.audit(), request.clone());
                            async move { service.list_audit_records(request).await }
                        })
                        .await?;
                    records.extend(page.records.iter().map(AuditRecordView::new));
                    request.page_token = page.next_page_token;
                    if request.page_token.is_empty() {
                        break;
                    }
                }
                context.output.data(&AuditListView { records }, AuditListView::human)?;
                Ok(Exit::Ok)
            }
            Audit::Verify => {
                let request = v1::VerifyAuditRequest { organization };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.audit(), request.clone());
                        async move { service.verify_audit(request).await }
                    })
                    .await?;
                let view = VerificationView::new(&answer);
                context.output.data(&view, VerificationView::human)?;
                Ok(if answer.intact { Exit::Ok } else { Exit::Refused })
            }
        }
    }
}
