//! `AccountService`.

use latchkey_proto::v1;
use latchkey_proto::v1::account_service_server::AccountService;
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert};
use crate::app::people::TokenScope;
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
        Ok(Response::new(v1::WhoAmIResponse { user, service_token, memberships }))
    }

    async fn create_user(
        &self,
        request: Request<v1::CreateUserRequest>,
    ) -> Result<Response<v1::CreateUserResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let role = match v1::Role::try_from(request.role) {
            Ok(v1::Role::Member) => Role::Member,
            Ok(v1::Role::Owner) => Role::Owner,
            Ok(v1::Role::Unspecified) | Err(_) => {
                return Err(Error::field("role", "say MEMBER or OWNER").into());
            }
        };
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

fn role_out(role: Role) -> i32 {
    match role {
        Role::Member => v1::Role::Member.into(),
        Role::Owner => v1::Role::Owner.into(),
    }
}
