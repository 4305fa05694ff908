//! `runner`: the build hosts.

use clap::Subcommand;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::pool::{RunnerListView, RunnerView};

#[derive(Debug, Subcommand)]
pub(crate) enum Runner {
    /// Lists the runners of all pools
    List,
}

impl Runner {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        match self {
            Runner::List => {
                let mut request = v1::ListRunnersRequest {
                    organization: session.organization()?,
                    ..Default::default()
                };
                let mut runners = Vec::new();
                loop {
                    let page = client
                        .call(|| {
                            let (mut service, request) = (client.pools(), request.clone());
                            async move { service.list_runners(request).await }
                        })
                        .await?;
                    runners.extend(page.runners.iter().map(RunnerView::new));
                    request.page_token = page.next_page_token;
                    if request.page_token.is_empty() {
                        break;
                    }
                }
                context.output.data(&RunnerListView { runners }, RunnerListView::human)?;
                Ok(Exit::Ok)
            }
        }
    }
}
