# What a Ray that serves flyray needs in its environment when it starts: . deploy/cluster/environment.sh && ray start …
# cluster/local_ray.py has the reasons; a Ray that flyray starts has it by itself.
export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=40
export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0
export RAY_SERVE_METRICS_EXPORT_INTERVAL_MS=5000
export RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.5
export RAY_SERVE_HAPROXY_BALANCE_ALGORITHM='leastconn
    option http-buffer-request'
export RAY_SERVE_HAPROXY_TUNE_BUFSIZE=131072
# RCCL reaches no GPU that is hidden from a process.
export RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES=1
export RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1
