-- Lays a lease. KEYS: the cell. ARGV: token, milliseconds, id of the value seen (zeros for none), "1" over a hold.
-- Answers 0 and the id it was laid over; 1 and a cell that is newer than the one seen; 2 or 3 and for how many
-- milliseconds more somebody loads, or nobody shall.
local key, token, ms, seen = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]
local zero, hold = string.rep('\0', 8), '\1' .. string.rep('\0', 7)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = token .. struct.pack('<I8', now + ms)
local head = redis.pcall('GETRANGE', key, 0, 27)
if type(head) == 'string' and #head == 28 and string.sub(head, 1, 3) == 'FC\1' then
    local kind, id, held = string.sub(head, 4, 4), string.sub(head, 5, 12), string.sub(head, 13, 20)
    if (kind == 'V' and id ~= zero) or (kind == 'L' and id == zero) then
        if kind == 'V' and id ~= seen then
            return {1, redis.call('GET', key)}
        end
        local left = struct.unpack('<I8', head, 21) - now
        -- No lease and no hold lasts longer than a minute: an end further ahead is damaged.
        if left > 0 and left <= 60000 and held ~= zero and held ~= token then
            if held ~= hold then
                return {2, left}
            end
            if ARGV[4] ~= '1' then
                return {3, left}
            end
        end
        redis.call('SETRANGE', key, 12, lease)
        local ttl = redis.call('PTTL', key)
        if ttl >= 0 and ttl < 2 * ms then
            redis.call('PEXPIRE', key, 2 * ms)
        end
        return {0, id}
    end
end
-- Nothing there, or nothing of ours.
redis.call('SET', key, 'FC\1L' .. zero .. lease, 'PX', 2 * ms)
return {0, zero}
