//! `MemberService`.

use latchkey_proto::v1;
use latchkey_proto::v1::member_service_server::MemberService;
use tonic::{Request, Response, Status};

use super::account::{access, access_out, role, role_out};
use super::{Service, caller, convert};
use crate::app::members::{MemberChange, MemberView};
use crate::error::{Error, Result};

#[tonic::async_trait]
impl MemberService for Service {
    async fn list_members(
        &self,
        request: Request<v1::ListMembersRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListMembersRequest { organization, page_size, page_token } = request.into_inner();
        let page = convert::page(page_size, page_token);
        let page = self.app.list_members(&caller, &organization, page).await?;
        Ok(Response::new(v1::ListMembersResponse {
            members: page.items.into_iter().map(out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn add_member(
        &self,
        request: Request<v1::AddMemberRequest>,
    ) -> Result<Response<v1::AddMemberResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let role = role(request.role)?.ok_or_else(|| Error::field("role", ROLES))?;
        let environments = environments(request.environments)?;
        if environments.iter().any(|(_, access)| access.is_none()) {
            return Err(Error::field("environments", "each names its access").into());
        }
        let change =
            MemberChange { role: Some(role), access: access(request.access)?, environments };
        let member =
            self.app.add_member(&caller, &request.organization, &request.user, change).await?;
        Ok(Response::new(v1::AddMemberResponse { member: Some(out(member)) }))
    }

    async fn update_member(
        &self,
        request: Request<v1::UpdateMemberRequest>,
    ) -> Result<Response<v1::UpdateMemberResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let change = MemberChange {
            role: role(request.role)?,
            access: access(request.access)?,
            environments: environments(request.environments)?,
        };
        let member =
            self.app.update_member(&caller, &request.organization, &request.user, change).await?;
        Ok(Response::new(v1::UpdateMemberResponse { member: Some(out(member)) }))
    }

    async fn remove_member(
        &self,
        request: Request<v1::RemoveMemberRequest>,
    ) -> Result<Response<v1::RemoveMemberResponse>, Status> {
        let caller = caller(&request)?;
        let v1::RemoveMemberRequest { organization, user } = request.into_inner();
        self.app.remove_member(&caller, &organization, &user).await?;
        Ok(Response::new(v1::RemoveMemberResponse {}))
    }
}

pub(super) const ROLES: &str = "say MEMBER or OWNER";

type Environments = Vec<(String, Option<crate::store::record::people::Access>)>;

fn environments(given: Vec<v1::EnvironmentAccess>) -> Result<Environments> {
    given.into_iter().map(|entry| Ok((entry.environment, access(entry.access)?))).collect()
}

fn out(member: MemberView) -> v1::Member {
    let MemberView { user, membership, environments } = member;
    v1::Member {
        user,
        role: role_out(membership.role),
        access: access_out(membership.access),
        environments: environments
            .into_iter()
            .map(|(environment, access)| v1::EnvironmentAccess {
                environment,
                access: access_out(access),
            })
            .collect(),
        create_time: membership.created_at.map(|at| convert::timestamp(at.into())),
    }
}
