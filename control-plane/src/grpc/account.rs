//! `AccountService`.

use latchkey_domain::id::GlassId;
use latchkey_proto::v1;
use latchkey_proto::v1::account_service_server::AccountService;
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::member::ROLES;
use super::{Service, caller, convert};
use crate::app::service_tokens::{ServiceTokenView, TokenScope};
use crate::auth::Caller;
use crate::error::Error;
use crate::store::record::people::{Access, Role};

#[tonic::async_trait]
impl AccountService for Service {
    async fn bootstrap(
        &self,
        request: Request<v1::BootstrapRequest>,
    ) -> Result<Response<v1::BootstrapResponse>, Status> {
        let request = request.into_inner();
        let secret = request.secret.into();
        let token = self.app.bootstrap(&secret, &request.organization, &request.user).await?;
        Ok(Response::new(v1::BootstrapResponse { token: token.expose_secret().to_owned() }))
    }

    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let who = self.app.who_am_i(&caller(&request)?).await?;
        let (user, service_token) = match who.caller {
            Caller::User { name, .. } => (name, String::new()),
            Caller::Service { name, .. } => (String::new(), name),
        };
        let memberships = who
            .memberships
            .into_iter()
            .map(|(organization, role)| v1::Membership { organization, role: role_out(role) })
            .collect();
        let broken_glass = who
            .broken_glass
            .into_iter()
            .map(|(organization, glass)| v1::BrokenGlass {
                glass_id: glass.id.0.to_string(),
                organization,
                time: Some(convert::timestamp(glass.at.into())),
                what: glass.what,
                reason: glass.reason,
            })
            .collect();
        Ok(Response::new(v1::WhoAmIResponse { user, service_token, memberships, broken_glass }))
    }

    async fn acknowledge_break_glass(
        &self,
        request: Request<v1::AcknowledgeBreakGlassRequest>,
    ) -> Result<Response<v1::AcknowledgeBreakGlassResponse>, Status> {
        let caller = caller(&request)?;
        let v1::AcknowledgeBreakGlassRequest { organization, glass_id } = request.into_inner();
        let glass: Result<GlassId, Error> =
            glass_id.parse().map_err(|_| Error::field("glass_id", "it is not an id (a UUID)"));
        self.app.acknowledge_glass(&caller, &organization, glass?).await?;
        Ok(Response::new(v1::AcknowledgeBreakGlassResponse {}))
    }

    async fn create_user(
        &self,
        request: Request<v1::CreateUserRequest>,
    ) -> Result<Response<v1::CreateUserResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let role = role(request.role)?.ok_or_else(|| Error::field("role", ROLES))?;
        let access = access(request.access)?.unwrap_or_default();
        let v1::CreateUserRequest { organization, user, request_id, .. } = request;
        let token =
            self.app.create_user(&caller, &organization, &user, role, access, &request_id).await?;
        Ok(Response::new(v1::CreateUserResponse { token: token.expose_secret().to_owned() }))
    }

    async fn create_service_token(
        &self,
        request: Request<v1::CreateServiceTokenRequest>,
    ) -> Result<Response<v1::CreateServiceTokenResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let lifetime = convert::duration("lifetime", request.lifetime)?;
        let access = access(request.access)?.unwrap_or_default();
        let scope = TokenScope { access, environments: request.environments };
        let (token, expires_at) = self
            .app
            .create_service_token(
                &caller,
                &request.organization,
                &request.name,
                lifetime,
                scope,
                &request.request_id,
            )
            .await?;
        Ok(Response::new(v1::CreateServiceTokenResponse {
            token: token.expose_secret().to_owned(),
            expire_time: Some(convert::timestamp(expires_at)),
        }))
    }

    async fn reset_user(
        &self,
        request: Request<v1::ResetUserRequest>,
    ) -> Result<Response<v1::ResetUserResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ResetUserRequest { organization, user, request_id } = request.into_inner();
        let token = self.app.reset_user(&caller, &organization, &user, &request_id).await?;
        Ok(Response::new(v1::ResetUserResponse { token: token.expose_secret().to_owned() }))
    }

    async fn list_service_tokens(
        &self,
        request: Request<v1::ListServiceTokensRequest>,
    ) -> Result<Response<v1::ListServiceTokensResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListServiceTokensRequest { organization, page_size, page_token } =
            request.into_inner();
        let page = convert::page(page_size, page_token);
        let page = self.app.list_service_tokens(&caller, &organization, page).await?;
        Ok(Response::new(v1::ListServiceTokensResponse {
            service_tokens: page.items.into_iter().map(service_token_out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn revoke_service_token(
        &self,
        request: Request<v1::RevokeServiceTokenRequest>,
    ) -> Result<Response<v1::RevokeServiceTokenResponse>, Status> {
        let caller = caller(&request)?;
        let v1::RevokeServiceTokenRequest { organization, name } = request.into_inner();
        self.app.revoke_service_token(&caller, &organization, &name).await?;
        Ok(Response::new(v1::RevokeServiceTokenResponse {}))
    }
}

fn service_token_out(view: ServiceTokenView) -> v1::ServiceToken {
    let ServiceTokenView { record, access, environments } = view;
    v1::ServiceToken {
        name: record.name,
        access: access_out(access),
        environments,
        creator: record.created_by,
        create_time: Some(convert::timestamp(record.created_at.into())),
        expire_time: Some(convert::timestamp(record.expires_at.into())),
    }
}

/// Reads a role; unspecified is absent.
pub(super) fn role(value: i32) -> Result<Option<Role>, Error> {
    match v1::Role::try_from(value) {
        Ok(v1::Role::Unspecified) => Ok(None),
        Ok(v1::Role::Member) => Ok(Some(Role::Member)),
        Ok(v1::Role::Owner) => Ok(Some(Role::Owner)),
        Err(_) => Err(Error::field("role", ROLES)),
    }
}

/// Reads an access; unspecified is absent.
pub(super) fn access(value: i32) -> Result<Option<Access>, Error> {
    match v1::Access::try_from(value) {
        Ok(v1::Access::Unspecified) => Ok(None),
        Ok(v1::Access::None) => Ok(Some(Access::None)),
        Ok(v1::Access::Read) => Ok(Some(Access::Read)),
        Ok(v1::Access::Write) => Ok(Some(Access::Write)),
        Ok(v1::Access::Admin) => Ok(Some(Access::Admin)),
        Err(_) => Err(Error::field("access", "say NONE, READ, WRITE or ADMIN")),
    }
}

pub(super) fn role_out(role: Role) -> i32 {
    match role {
        Role::Member => v1::Role::Member.into(),
        Role::Owner => v1::Role::Owner.into(),
    }
}

pub(super) fn access_out(access: Access) -> i32 {
    match access {
        Access::None => v1::Access::None.into(),
        Access::Read => v1::Access::Read.into(),
        Access::Write => v1::Access::Write.into(),
        Access::Admin => v1::Access::Admin.into(),
    }
}
